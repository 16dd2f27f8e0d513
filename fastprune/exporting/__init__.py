"""Forms that other engines load: what `fastprune.export` writes."""

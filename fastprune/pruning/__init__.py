"""Score, plan, cut, compensate: what `fastprune.prune` does."""

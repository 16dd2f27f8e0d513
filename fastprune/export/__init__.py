"""Forms that other engines load."""

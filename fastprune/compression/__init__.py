"""The whole way in one command: dense figures, prune, recover, merge, figures, checkpoint."""

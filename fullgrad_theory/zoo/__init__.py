"""Many architectures audited: their sources, workers with limits, and the file of results."""

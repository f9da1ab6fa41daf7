"""Data: domains, transforms and loaders, from files to batches."""

"""Domains, transforms and loaders: everything that turns files into a batch."""

"""Domains, transforms and loaders: everything that turns files into a :class:`~fastuda.data.batch.Batch`."""

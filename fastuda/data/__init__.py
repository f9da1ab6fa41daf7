"""Domains, transforms and loaders: everything that turns files into a :class:`~fastuda.data.loading.batch.Batch`."""

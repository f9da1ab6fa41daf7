"""Finished runs at work: evaluation, prediction and export."""

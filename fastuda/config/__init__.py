"""Configurations of runs: their schema, and how they are resolved."""

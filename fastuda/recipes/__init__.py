"""Annotated YAML configurations, one per published run, loaded by name with ``--config NAME``."""

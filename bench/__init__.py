"""Measurements of the ops against the hardware's limit, the reference and the alternatives."""

"""Processes, memory, files, random numbers and the log."""

"""Data sets: their classes, files and splits, read as train ids."""

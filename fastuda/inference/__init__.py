"""Use of finished runs: evaluation, prediction and export."""

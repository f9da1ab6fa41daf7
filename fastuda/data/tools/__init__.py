"""Work on whole data sets: checks, class statistics and smaller copies."""

"""Studies: a grid of runs, done by any number of workers, and what its results show."""

"""Read the runs of quartet without torch: their page, comparisons of runs, and what to change first."""

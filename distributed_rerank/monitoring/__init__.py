"""A history of scheduled evaluations: comparisons, regressions, the trend page."""

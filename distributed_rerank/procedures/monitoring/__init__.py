"""Whether a run is worse than an earlier one: comparison of runs, regression, history and its trend. Layer 3."""

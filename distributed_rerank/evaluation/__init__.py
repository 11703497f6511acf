"""Figures of rankings: metrics with intervals, baselines, diagnostics, costs, and the files they end in."""

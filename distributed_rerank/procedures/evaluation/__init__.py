"""Layer 3. What re-ranking was worth: figures, the run from catalogue to report, and exports."""

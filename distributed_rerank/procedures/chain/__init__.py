"""Layer 3. The re-ranking chain: its steps as data, applied to lists, and chosen on set-aside labels."""

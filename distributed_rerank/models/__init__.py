"""Layer 2: extractors (image -> embedding) and pairwise models (two images -> logit)."""

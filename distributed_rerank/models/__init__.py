"""Extractors (image -> embedding) and pairwise models (two images -> logit)."""

"""The re-ranking chain: as data, applied to lists, and chosen on labels set aside from train."""

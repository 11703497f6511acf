"""The re-ranking chain: as data, applied to candidate lists, and chosen on labels set aside from train."""

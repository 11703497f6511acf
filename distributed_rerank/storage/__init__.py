"""Where bytes lie and how they stay whole: files, buckets, locks, digests, folders that are complete or absent."""

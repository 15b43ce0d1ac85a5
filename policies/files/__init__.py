"""Files that are complete or absent, their digests, and the hub they may come from."""

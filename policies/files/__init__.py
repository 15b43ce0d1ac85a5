"""Files that are complete or absent, their digests, and the hub from which they may come."""

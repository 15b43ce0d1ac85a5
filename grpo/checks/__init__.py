"""What a run refuses before it begins."""

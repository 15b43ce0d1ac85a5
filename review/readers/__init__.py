"""What a run has written into its folder, read again."""

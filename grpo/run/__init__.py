"""What a run writes, keeps and shows, and how it stops."""

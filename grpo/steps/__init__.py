"""What a step draws, publishes and saves, and who looks at it."""

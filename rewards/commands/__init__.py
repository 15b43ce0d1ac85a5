"""What `quartet reward` and `quartet-reward` do with rewards, without a model."""

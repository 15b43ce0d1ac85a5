"""From examples to prompts, and the order in which training takes them."""

"""From a data set to prompts, and the order in which training meets them."""

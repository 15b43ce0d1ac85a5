"""How a policy decodes: which rows are live, one round of them, and what they have sampled."""

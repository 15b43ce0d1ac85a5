"""The formulas: pure functions on tensors and numbers."""

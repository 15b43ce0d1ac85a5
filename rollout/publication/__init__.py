"""How weights reach the samplers, and how one knows that they have: messages, deltas, digests and canaries."""

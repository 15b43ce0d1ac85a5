"""How weights reach the samplers, and how one knows that they have: messages, digests and canaries."""

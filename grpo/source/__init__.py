"""Which policy a name means, and what goes with what."""

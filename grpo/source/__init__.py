"""Which policy a name means, and how it is loaded."""

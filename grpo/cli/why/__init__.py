"""What a step of a run has done, and because of what: `quartet why`."""

"""What to change first in a run that does not learn, and why: `quartet diagnose`."""

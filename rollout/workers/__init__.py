"""The processes that sample: this one, or workers of Ray on this machine and others."""

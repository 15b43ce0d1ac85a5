"""Every option of a run, by subject. Those of rewards and data, and how options are read, are in rewards/config."""

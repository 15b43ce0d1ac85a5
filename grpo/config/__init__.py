"""Every option, by subject, and how options are read."""

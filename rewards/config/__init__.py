"""Options: how they are declared, read from YAML and a command line, and explained; and those of rewards and data."""

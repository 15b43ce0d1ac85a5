"""What several turns need: the form of turns and calls, tools, and environments that are built in."""

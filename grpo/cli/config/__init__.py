"""The options of the commands that do not train."""

"""The tool: what `quartet` parses, does and shows. Nothing of the trainer imports it."""

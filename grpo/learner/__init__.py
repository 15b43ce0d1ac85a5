"""From scored groups to an optimizer step."""

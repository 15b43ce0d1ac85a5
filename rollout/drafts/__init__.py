"""The sources of drafts."""

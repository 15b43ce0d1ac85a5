"""Requests that join and leave a batch while it is decoded, and the conversations that they continue."""

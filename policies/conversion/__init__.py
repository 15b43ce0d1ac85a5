"""Conversion of a dense checkpoint of the Llama family to a policy."""

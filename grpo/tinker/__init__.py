"""Tinker's API on this machine: its SDK's training and sampling clients talk to a policy here."""

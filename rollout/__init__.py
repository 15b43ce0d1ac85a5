"""Rollouts: prompts become groups of completions. The policy's MTP head drafts them, and drafts change no token."""

"""Rollouts: prompts in, groups of completions out, drafted by the policy's MTP head and exact."""

"""Prompts in proportion to p(1 − p), where p is what was met of a prompt, or what its words let expect.

VIP (arXiv:2602.01601) predicts p before it samples; GRESO (arXiv:2506.02177) skips by what was met alone.
"""

OPTIONS = {"curriculum.by_difficulty": True}

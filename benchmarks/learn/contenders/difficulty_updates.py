"""Prompts in proportion to p(1 − p), as `difficulty` has them, and two updates on each batch, as `updates` has them."""

from benchmarks.learn.contenders import difficulty, updates

OPTIONS = {**difficulty.OPTIONS, **updates.OPTIONS}

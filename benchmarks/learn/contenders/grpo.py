"""GRPO as the task's configuration has it: what the others are compared with."""

OPTIONS: dict[str, object] = {}

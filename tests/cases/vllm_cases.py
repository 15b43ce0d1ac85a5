"""What the tests of vLLM's server share."""

import time
from pathlib import Path

import pytest

PYTHON = Path(__file__).parents[2] / ".vllm/bin/python"
HEADS = {"qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}  # a size that its attention on CPUs knows
needs_vllm = [pytest.mark.peer, pytest.mark.skipif(not PYTHON.is_file(), reason="vLLM is not installed: make vllm")]


def gone(pid: int, seconds: float = 20.0) -> bool:
    """Whether this process ends within so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":  # it waits for its parent to look
            return True
        time.sleep(0.05)
    return False

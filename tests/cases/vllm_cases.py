"""What the tests of vLLM's server share."""

import time
from pathlib import Path


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

"""An environment in which a policy runs programs, in the sandbox."""

from __future__ import annotations

from rewards.isolation.sandbox import Limits, SandboxUnavailable, run_python, unavailable

LONGEST_ANSWER = 2000  # characters of what a program printed that the policy reads
LIMITS = Limits()
_ENDED = {
    "time": f"it took more than {LIMITS.seconds:g} s",
    "memory": f"it needs more than {LIMITS.memory >> 20} MiB of memory",
    "output": f"it wrote more than {LIMITS.output >> 20} MiB",
    "scratch": f"its files have more than {LIMITS.scratch >> 20} MiB",
    "processes": "it may start no process",
    "network": "it may use no network",
    "files": "it may use no files outside of its folder",
    "system call": "it made a system call that is not allowed",
}


class Python:
    """An environment whose one tool runs a Python program. Each program starts afresh, in an empty folder.

    Raises SandboxUnavailable where the machine does not allow a sandbox.

    >>> Python().run("print(6 * 7)")
    '42'
    """

    def __init__(self) -> None:
        if problem := unavailable():
            raise SandboxUnavailable(problem)

    def reset(self, **columns: object) -> None:
        """Keeps nothing between problems, nor between calls."""

    def run(self, program: str) -> str:
        """Runs a Python program and gives what it prints.

        Args:
            program: The whole program. It prints its result.
        """
        outcome = run_python(program, limits=LIMITS)
        parts = [outcome.stdout.strip()]
        if outcome.limit is not None:
            parts.append(f"error: {_ENDED[outcome.limit]}")
        elif outcome.exit_code:
            last = outcome.stderr.strip().rpartition("\n")[2]
            parts.append(f"error: {last or f'exit code {outcome.exit_code}'}")
        text = "\n".join(filter(None, parts))
        if len(text) > LONGEST_ANSWER:
            half = LONGEST_ANSWER // 2
            text = f"{text[:half]}\n...\n{text[-half:]}"
        return text or "nothing was printed"

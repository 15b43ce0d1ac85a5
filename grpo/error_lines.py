"""What went wrong, as the line that a command prints before it ends."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from grpo.run.escape import escaped

EXIT_ERROR, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


def expected_errors() -> tuple[type[Exception], ...]:
    """Errors whose message is written for the user; anything else is a bug and keeps its traceback."""
    from grpo.commands.recovery import RecoveryDiverged
    from grpo.learner.parallel import RankFailed
    from grpo.learner.teacher_server import TeacherError
    from grpo.learner.update import NonFiniteStep
    from grpo.run.checkpoint import CheckpointError
    from grpo.run.memory_errors import OutOfMemory
    from grpo.run.stop import Stopped
    from policies.conversion.parity import ParityFailed
    from rollout.engine import RolloutError

    some = CheckpointError, NonFiniteStep, OutOfMemory, ParityFailed
    return *some, RankFailed, RecoveryDiverged, RolloutError, Stopped, TeacherError


def option_of(error: Exception, args: argparse.Namespace) -> str:
    """`output_dir: ` for an error of the operating system about a file in the folder that this option names."""
    if not isinstance(error, OSError) or not isinstance(error.filename, str | Path):
        return ""  # one of our own messages, which name it themselves
    file = Path(error.filename).absolute()
    given = {name: value for name, value in vars(args).items() if isinstance(value, Path)}
    given |= {name: value for name, value in getattr(args, "overrides", {}).items() if isinstance(value, str | Path)}
    named = {name: Path(value).absolute() for name, value in given.items() if str(value)}
    of_file = [name for name, path in named.items() if file == path or path in file.parents or file in path.parents]
    longest = max(of_file, key=lambda name: len(named[name].parts), default=None)
    return f"{longest}: " if longest else ""


def fail(message: str, code: int) -> int:
    """The one place that prints errors. They quote what others wrote: rewards, column names, checkpoints."""
    print(escaped(f"quartet: {message}"), file=sys.stderr)
    return code

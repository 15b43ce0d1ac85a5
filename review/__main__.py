"""`quartet-review`, also as `python -m review`: view, report, compare and diagnose, without torch and a trainer."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from review.commands import commands
from rewards.commands.command_line import run, version_of


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="quartet-review", description="Look at runs of quartet, and compare them.")
    parser.add_argument("--version", action="version", version=f"quartet-review {version_of('quartet-review')}")
    return run(parser, commands(), sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())

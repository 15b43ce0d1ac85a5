"""`quartet-reward`, also as `python -m rewards`: what `quartet reward` does, without torch and without a trainer."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rewards.commands.command_line import run, version_of
from rewards.commands.table import commands


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="quartet-reward", description="Test rewards, and score records with them.")
    parser.add_argument("--version", action="version", version=f"quartet-reward {version_of('quartet-rewards')}")
    rows = {name.removeprefix("reward "): command for name, command in commands().items() if command.run}
    return run(parser, rows, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())

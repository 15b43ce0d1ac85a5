"""`quartet-reward`, also as `python -m rewards`: what `quartet reward` does, without torch and without a trainer."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import metadata

from rewards.commands.command_line import build_parser, fail, failed, prepare_output
from rewards.commands.table import commands


def main(argv: Sequence[str] | None = None) -> int:
    from rewards.config.options import parse

    words = sys.argv[1:] if argv is None else argv
    prepare_output()
    parser = argparse.ArgumentParser(prog="quartet-reward", description="Test rewards, and score records with them.")
    parser.add_argument("--version", action="version", version=f"quartet-reward {_version()}")
    rows = {name.removeprefix("reward "): command for name, command in commands().items() if command.run}
    args = None
    try:
        args = parse(build_parser(parser, rows, words), words)
        return int(args.command(args) or 0)
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    except Exception as error:
        return failed(error, args)


def _version() -> str:
    try:
        return metadata.version("quartet-rewards")
    except metadata.PackageNotFoundError:
        return "(run from its source, not installed)"


if __name__ == "__main__":
    sys.exit(main())

"""The commands that need no model: they are rows of `quartet`'s table, and all that `quartet-reward` has."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rewards.commands.command_line import Command, argument, json_argument
from rewards.registry import CHAT, FORMS

_FUNCTION: dict[str, Any] = {
    "metavar": "FILE:FN",
    "help": "path/to/file.py:function, package.module:function, or a built-in reward's name",
}
_AS = argument(
    "--as",
    dest="form",
    choices=[*FORMS, CHAT.rstrip(":")],
    help="the function is written for this tool, default: trl; chat: for chat messages",
)
TEST = (argument("function", **_FUNCTION), _AS, json_argument("what was found"))
REPLAY = (
    argument(
        "run",
        type=Path,
        metavar="RUN",
        help="a run folder, or rollouts of TRL, verl, verifiers, prime-rl or NeMo-Gym; nothing in it is touched",
    ),
    argument("--with", dest="function", required=True, **_FUNCTION),
    _AS,
    json_argument("every change"),
)
AUDIT = (
    argument("traces", type=Path, metavar="TRACES", help="a file or folder of rollouts, of any of the known trainers"),
    argument(
        "--with",
        dest="functions",
        action="append",
        metavar="FILE:FN",
        help="score again with this reward; repeat it for more",
    ),
    argument(
        "--evaluation", type=Path, metavar="FILE", help="rollouts of the evaluation: nothing of it may be trained on"
    ),
    argument("--tokenizer", type=Path, metavar="FILE", help="a tokenizer.json, or its folder: are the ids the text?"),
    argument("--html", type=Path, metavar="OUT", help="write a page with the rollouts to look at to this file"),
    json_argument("what was found"),
)


def commands() -> dict[str, Command]:
    """Every row by the name that it has after `quartet`; after `quartet-reward` it is without `reward`."""
    from rewards.audit.options import AuditConfig
    from rewards.commands.options import ReplayConfig, RewardTestConfig

    return {
        "reward": Command("try a reward function, or score recorded completions with another one"),
        "reward test": Command(
            "try a reward function on data, without a model", _test, TEST, RewardTestConfig, "mine.py:f"
        ),
        "reward replay": Command(
            "score recorded completions with another function",
            _replay,
            REPLAY,
            ReplayConfig,
            "runs/demo --with mine.py:f",
        ),
        "audit": Command(
            "check recorded rollouts of any trainer for errors", _audit, AUDIT, AuditConfig, "rollouts.jsonl"
        ),
    }


def _test(args: argparse.Namespace) -> int:
    config = options_of(args)
    from rewards.commands.check import check_reward
    from rewards.commands.printer import publish

    return publish(check_reward(_function(args), config), args)


def _replay(args: argparse.Namespace) -> int:
    config = options_of(args)
    from rewards.commands.printer import publish
    from rewards.commands.replay import replay

    return publish(replay(args.run, _function(args), config), args)


def _function(args: argparse.Namespace) -> str:
    return f"{args.form}:{args.function}" if args.form else args.function


def _audit(args: argparse.Namespace) -> int:
    config = options_of(args)
    from rewards.audit.audit import audit
    from rewards.commands.printer import publish

    return publish(audit(args.traces, config, args.functions or (), args.evaluation, args.tokenizer), args)


def options_of(args: argparse.Namespace) -> Any:
    """Returns the options of a command that reads no file of options."""
    from rewards.config.options import load

    return load(args.options, None, args.overrides, args.flags)

"""`quartet`: the table of its commands, and how they are parsed and end. What each one does is in actions.py.

Modules that load transformers or Ray are imported inside the commands, so that --help and a typo answer at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from grpo.cli import actions, arguments
from grpo.cli.actions import EXIT_ERROR, EXIT_USAGE, expected_errors, fail, option_of
from grpo.run.stop import signals
from policies.openmp import wait_briefly
from rewards.isolation.output import escaped

if TYPE_CHECKING:
    from pydantic import BaseModel

OURS = ("", "policies", "rollout", "rewards", "grpo")


class EscapingFormatter(logging.Formatter):
    """Warnings as Python prints them by default, escaped: they may quote a reward or a checkpoint."""

    def format(self, record: logging.LogRecord) -> str:
        return escaped(super().format(record))


def main(argv: Sequence[str] | None = None) -> int:
    _open_closed_files()
    wait_briefly()  # before anything loads torch
    with signals.heard():
        return _main(sys.argv[1:] if argv is None else argv)


def _open_closed_files() -> None:
    """Opens standard input, output and error where they are closed: the next file would get their number, and what a
    library prints would be written into it."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it gets the lowest number that is free


def _main(words: Sequence[str]) -> int:
    from grpo.config.names import aliases
    from grpo.config.options import ConfigError, parse

    if logging.lastResort is not None:
        logging.lastResort.setFormatter(EscapingFormatter())
    name = next(iter(words), "")
    if name not in _commands() and (way_on := aliases("removed_commands").get(name)):
        return fail(f"{name}: this command is gone; {way_on}", EXIT_USAGE)
    parser = build_parser(words)
    try:
        args = parse(parser, words)
        signals.unwinds = args.command not in (actions.run, actions.mtp)  # a run takes notes once there is work to save
        return int(args.command(args) or 0)
    except (Exception, KeyboardInterrupt) as error:
        if stopped := signals.stopped(error):
            return fail(str(stopped), stopped.exit_code)
        if isinstance(error, ConfigError):
            return fail("\n  ".join(["the configuration is not usable:", *error.problems]), EXIT_USAGE)
        if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] not in OURS:
            what = f"the package {error.name!r} is not installed in this environment ({sys.executable})"
            return fail(f"{what}: install quartet there again, or the package alone", EXIT_ERROR)
        if not isinstance(error, expected_errors()):
            raise
        return fail(f"{option_of(error, args)}{error}", EXIT_ERROR)


class Command(NamedTuple):
    """A row of the table: what `quartet NAME` is for, which function runs it, its arguments and its options."""

    help: str
    run: Callable[[argparse.Namespace], int | None] | None = None  # one without has other commands below it
    takes: Sequence[arguments.Argument] = ()
    options: type[BaseModel] | None = None


def _commands() -> dict[str, Command]:
    """Every command by its name, in the order of --help and of the reference page."""
    from grpo.cli.config.convert import ConvertConfig
    from grpo.cli.config.environment_test import EnvironmentTestConfig
    from grpo.cli.config.inference import EvalConfig, SampleConfig
    from grpo.cli.config.reward_commands import ReplayConfig, RewardTestConfig
    from grpo.cli.config.serve import ServeConfig
    from grpo.cli.quantize.options import QuantizeConfig
    from grpo.config.mtp import MtpConfig
    from grpo.config.run import SftConfig, TrainConfig

    return {
        "train": Command("GRPO, after an optional warm start", actions.run, arguments.TRAIN, TrainConfig),
        "sft": Command("supervised fine-tuning on prompts and gold solutions", actions.run, arguments.TRAIN, SftConfig),
        "mtp": Command("teach the draft head what the policy says", actions.mtp, arguments.MTP, MtpConfig),
        "eval": Command(
            "accuracy or mean reward of a policy on held-out problems", actions.evaluate, arguments.EVAL, EvalConfig
        ),
        "sample": Command("completions of your own prompts", actions.sample, arguments.SAMPLE, SampleConfig),
        "serve": Command("a policy for other programs, by OpenAI's API", actions.serve, arguments.SERVE, ServeConfig),
        "reward": Command("try a reward function, or score a run again with another one"),
        "reward test": Command(
            "gold, empty, wrong and hostile completions", actions.reward_test, arguments.REWARD_TEST, RewardTestConfig
        ),
        "reward replay": Command(
            "score a run's completions again", actions.reward_replay, arguments.REWARD_REPLAY, ReplayConfig
        ),
        "environment": Command("try an environment or a tool"),
        "environment test": Command(
            "scripted episodes without a model: state, limits, determinism",
            actions.environment_test,
            arguments.ENVIRONMENT_TEST,
            EnvironmentTestConfig,
        ),
        "convert": Command(
            "a dense Llama-family checkpoint as DeepSeek-V3", actions.convert, arguments.CONVERT, ConvertConfig
        ),
        "quantize": Command(
            "a policy in 4 or 8 bits a weight, for transformers and vLLM, and what that costs",
            actions.quantize,
            arguments.QUANTIZE,
            QuantizeConfig,
        ),
        "policy": Command("what a policy is made of"),
        "policy inspect": Command(
            "parameters, cache and FLOPs per token, experts, MTP layers, LoRA's share",
            actions.inspect,
            arguments.INSPECT,
        ),
        "check": Command(
            "does an architecture train right: by transformers, by quartet, by TRL", actions.check, arguments.CHECK
        ),
        "export": Command(
            "a run's policy for other tools, with tokenizer, licence and model card", actions.export, arguments.EXPORT
        ),
        "why": Command("what a step of a run has done, and which groups and tokens did it", actions.why, arguments.WHY),
        "view": Command("a page of one or more runs, live while they run", actions.view, arguments.VIEW),
        "report": Command("the same page as one HTML file to send away", actions.report, arguments.REPORT),
        "compare": Command("curves of runs with several seeds, in numbers", actions.compare, arguments.COMPARE),
        "reference": Command("print the reference page of all options and metrics", _reference),
    }


def build_parser(words: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """The parser of all commands, with the options of the one that `words` begin with; without words it has those of
    all. `args.command` is the function to call, `args.options` the class of the options."""
    from grpo.config.options import add_options

    begun = None if words is None else " ".join(word for word in words if not word.startswith("-"))
    parser = argparse.ArgumentParser(
        prog="quartet", description="GRPO for MoE/MLA language models with lossless multi-token rollouts."
    )
    parser.add_argument("--version", action="version", version=f"quartet {arguments.version()}")
    groups = {"": _add_group(parser)}
    for name, command in _commands().items():
        group, _, last = name.rpartition(" ")
        options = command.options
        sub = groups[group].add_parser(last, help=command.help, description=options.__doc__ if options else None)
        if command.run is None:
            groups[name] = _add_group(sub)
            continue
        for names, settings in command.takes:
            sub.add_argument(*names, **settings)
        if options and (begun is None or f"{begun} ".startswith(f"{name} ")):
            add_options(sub, options)
        sub.set_defaults(command=command.run, options=options)
    return parser


def _add_group(parser: argparse.ArgumentParser) -> Any:
    """Places for commands; without one of them the parser's help is printed."""
    parser.set_defaults(command=lambda _: parser.print_help())
    return parser.add_subparsers(title="commands", metavar="COMMAND")


def _reference(args: argparse.Namespace) -> None:
    from grpo.config.options import reference_page
    from grpo.run.metrics import table

    for name, command in _commands().items():
        if command.options:
            print(f"# quartet {name}\n\n{reference_page(command.options)}")
    print(f"# Metrics\n\n{table()}", end="")

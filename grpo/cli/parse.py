"""`quartet`: the table of its commands, and how they end. What each one does is in actions.py; what declares and parses
them is rewards/commands/command_line.py.

Modules that load transformers or Ray are imported inside the commands, so that --help and a typo answer at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from grpo.cli import actions, arguments
from grpo.cli.actions import expected_errors
from grpo.run.stop import signals
from policies.openmp import wait_briefly
from rewards.commands import command_line, table
from rewards.commands.command_line import EXIT_USAGE, Command, fail, failed, prepare_output


def main(argv: Sequence[str] | None = None) -> int:
    prepare_output()
    wait_briefly()  # before anything loads torch
    with signals.heard():
        return _main(sys.argv[1:] if argv is None else argv)


def _main(words: Sequence[str]) -> int:
    from rewards.config.names import aliases
    from rewards.config.options import parse

    name = next(iter(words), "")
    if name not in _commands() and (way_on := aliases("removed_commands").get(name)):
        return fail(f"{name}: this command is gone; {way_on}", EXIT_USAGE)
    parser, args = build_parser(words), None
    try:
        args = parse(parser, words)
        signals.unwinds = args.command not in (actions.run, actions.mtp)  # a run takes notes once there is work to save
        return int(args.command(args) or 0)
    except (Exception, KeyboardInterrupt) as error:
        if stopped := signals.stopped(error):
            return fail(str(stopped), stopped.exit_code)
        return failed(error, args, expected_errors())


def _commands() -> dict[str, Command]:
    """Every command by its name, in the order of --help and of the reference page."""
    from grpo.cli.config.convert import ConvertConfig
    from grpo.cli.config.environment_test import EnvironmentTestConfig
    from grpo.cli.config.inference import EvalConfig, SampleConfig
    from grpo.cli.config.serve import ServeConfig
    from grpo.cli.quantize.options import QuantizeConfig
    from grpo.config.mtp import MtpConfig
    from grpo.config.run import SftConfig, TrainConfig

    return {
        "train": Command("GRPO, after an optional warm start", actions.run, arguments.TRAIN, TrainConfig),
        "sft": Command("supervised fine-tuning on prompts and gold solutions", actions.run, arguments.TRAIN, SftConfig),
        "rehearse": Command(
            "two steps with a small random policy, and what would end or spoil the run",
            actions.rehearse,
            arguments.REHEARSE,
            TrainConfig,
        ),
        "mtp": Command("teach the draft head what the policy says", actions.mtp, arguments.MTP, MtpConfig),
        "eval": Command(
            "accuracy or mean reward of a policy on held-out problems", actions.evaluate, arguments.EVAL, EvalConfig
        ),
        "control": Command(
            "what supervised steps and rejection sampling give in the seconds of a run",
            actions.control,
            arguments.CONTROL,
        ),
        "sample": Command("completions of your own prompts", actions.sample, arguments.SAMPLE, SampleConfig),
        "serve": Command("a policy for other programs, by OpenAI's API", actions.serve, arguments.SERVE, ServeConfig),
        **table.commands(),
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
        "diagnose": Command(
            "what to change first in a run that does not learn, and why", actions.diagnose, arguments.DIAGNOSE
        ),
        "view": Command("a page of one or more runs, live while they run", actions.view, arguments.VIEW),
        "report": Command("the same page as one HTML file to send away", actions.report, arguments.REPORT),
        "compare": Command("curves of runs with several seeds, in numbers", actions.compare, arguments.COMPARE),
        "from-trl": Command(
            "a script with TRL's GRPOTrainer as a file for `quartet train`", actions.from_trl, arguments.FROM_TRL
        ),
        "from-verl": Command(
            "a command of verl's as a file for `quartet train`", actions.from_verl, arguments.FROM_VERL
        ),
        "reference": Command("print the reference page of all options and metrics", _reference),
    }


def build_parser(words: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """The parser of all commands, see `command_line.build_parser`."""
    parser = argparse.ArgumentParser(
        prog="quartet", description="GRPO for MoE/MLA language models with lossless multi-token rollouts."
    )
    parser.add_argument("--version", action="version", version=f"quartet {arguments.version()}")
    return command_line.build_parser(parser, _commands(), words)


def _reference(args: argparse.Namespace) -> None:
    from grpo.run import metrics
    from rewards.config.options import reference_page

    for name, command in _commands().items():
        if command.options and getattr(command.options, "command", "") == name:  # else they are another command's
            print(f"# quartet {name}\n\n{reference_page(command.options)}")
    print(f"# Metrics\n\n{metrics.table()}", end="")

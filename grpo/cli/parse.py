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
from review import commands
from rewards.commands import command_line, table
from rewards.commands.command_line import Command, check_output, fail, failed, prepare_output

# The commands as `quartet --help` lists them.
SECTIONS = {
    "train a policy": ("train", "sft", "mtp"),
    "look at a run": ("view", "report", "compare", "diagnose", "why", "reference"),
    "measure": (
        *("eval", "control", "sample", "check", "rehearse"),
        *("reward test", "reward replay", "audit", "environment test"),
    ),
    "use a policy": ("serve", "export", "convert", "quantize", "policy inspect"),
    "come from another trainer": ("from-trl", "from-verl"),
}


def main(argv: Sequence[str] | None = None) -> int:
    prepare_output()
    wait_briefly()  # before anything loads torch
    with signals.heard():
        return _main(sys.argv[1:] if argv is None else argv)


def _main(words: Sequence[str]) -> int:
    from rewards.config.options import parse

    parser, args = build_parser(words), None
    try:
        args = parse(parser, words)
        check_output(args)
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
        "train": Command(
            "reinforcement learning with GRPO",
            actions.run,
            arguments.TRAIN,
            TrainConfig,
            "examples/01_demo.yaml",
        ),
        "sft": Command(
            "supervised fine-tuning on prompts and solutions",
            actions.run,
            arguments.TRAIN,
            SftConfig,
            "--model MODEL --data.name mine.jsonl",
        ),
        "mtp": Command(
            "train the MTP head, which drafts tokens",
            actions.mtp,
            arguments.MTP,
            MtpConfig,
            "runs/demo --output_dir runs/demo_mtp",
        ),
        **commands.commands(),
        "why": Command(
            "what a step changed, and which groups and tokens did it",
            actions.why,
            arguments.WHY,
            example="runs/demo 20",
            about="Repeat a step of a run and show what it changed, and which groups and tokens did it.",
        ),
        "eval": Command(
            "accuracy or mean reward on held-out problems",
            actions.evaluate,
            arguments.EVAL,
            EvalConfig,
            "runs/demo --eval.limit 64",
        ),
        "control": Command(
            "supervised training for as many seconds as a run took",
            actions.control,
            arguments.CONTROL,
            example="runs/demo",
            about="Train the control of a run: supervised steps, and rejection sampling, in the same time.",
        ),
        "sample": Command(
            "completions of your own prompts",
            actions.sample,
            arguments.SAMPLE,
            SampleConfig,
            "runs/demo --prompt '2 + 3 = ?'",
        ),
        "check": Command(
            "whether an architecture trains correctly",
            actions.check,
            arguments.CHECK,
            example="qwen3_5",
            about="Check with a small random policy whether an architecture trains correctly in quartet and TRL.",
        ),
        "rehearse": Command(
            "a smoke test of a run, without its weights",
            actions.rehearse,
            arguments.REHEARSE,
            TrainConfig,
            "run.yaml",
            "Smoke test: take two steps with a small random policy of the same architecture, on the run's own data and "
            "rewards, and show what would crash or corrupt the run. It reads scripts of TRL and verl too.",
        ),
        "serve": Command(
            "serve a policy through OpenAI's API",
            actions.serve,
            arguments.SERVE,
            ServeConfig,
            "runs/demo --port 8000",
        ),
        **table.commands(),
        "environment": Command("try an environment or a tool"),
        "environment test": Command(
            "play scripted episodes, without a model",
            actions.environment_test,
            arguments.ENVIRONMENT_TEST,
            EnvironmentTestConfig,
            "calculator",
        ),
        "export": Command(
            "the policy of a run for other tools",
            actions.export,
            arguments.EXPORT,
            example="runs/demo exported",
            about="Write the policy of a run for other tools, with its tokenizer, licence and model card.",
        ),
        "convert": Command(
            "a dense Llama-family checkpoint as DeepSeek-V3",
            actions.convert,
            arguments.CONVERT,
            ConvertConfig,
            "MODEL converted --ffn moe",
        ),
        "quantize": Command(
            "weights in 4 or 8 bits, and what that costs",
            actions.quantize,
            arguments.QUANTIZE,
            QuantizeConfig,
            "runs/demo quantized --calibrate gsm8k",
        ),
        "policy": Command("show what a policy consists of"),
        "policy inspect": Command(
            "parameters, cache and FLOPs per token",
            actions.inspect,
            arguments.INSPECT,
            example="runs/demo",
            about="Show the parameters, the cache and the FLOPs per token of a policy, its experts and MTP layers.",
        ),
        "from-trl": Command(
            "a script with TRL's GRPOTrainer",
            actions.from_trl,
            arguments.FROM_TRL,
            example="script.py --out run.yaml",
            about="Write a script with TRL's GRPOTrainer as a file for `quartet train`.",
        ),
        "from-verl": Command(
            "a command of verl",
            actions.from_verl,
            arguments.FROM_VERL,
            example="run.sh --out run.yaml",
            about="Write a command of verl as a file for `quartet train`.",
        ),
        "reference": Command("the page of all options and metrics", _reference),
    }


def build_parser(words: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """The parser of all commands, see `command_line.build_parser`."""
    parser = argparse.ArgumentParser(
        prog="quartet",
        description=(
            "Reinforcement learning for language models with GRPO.\n\nexample: quartet train examples/01_demo.yaml"
        ),
    )
    parser.add_argument("--version", action="version", version=f"quartet {arguments.version()}")
    return command_line.build_parser(parser, _commands(), words, SECTIONS)


def _reference(args: argparse.Namespace) -> None:
    from review.readers import run_folder
    from rewards.config.options import reference_page

    for name, command in _commands().items():
        if command.options and getattr(command.options, "command", "") == name:  # else they are another command's
            print(f"# quartet {name}\n\n{reference_page(command.options)}")
    print(f"# Metrics\n\n{run_folder.table()}", end="")

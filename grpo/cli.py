"""`quartet`: sft, train, eval, sample, convert. Parsing and printing only; the work is done elsewhere.

Modules that load transformers or Ray are imported inside the commands, so that --help and a typo answer at once.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from grpo.config import SftConfig

Config = TypeVar("Config", bound="SftConfig")
EXIT_ERROR, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_STOPPED = 1, 2, 130, 143


def main(argv: Sequence[str] | None = None) -> int:
    from grpo.options import ConfigError, parse

    parser, resumable = build_parser(), False
    try:
        args = parse(parser, argv)
        resumable = args.command is _train
        return int(args.command(args) or 0)
    except ConfigError as error:
        return _fail(
            "the configuration is not usable:\n" + "\n".join(f"  {line}" for line in error.problems), EXIT_USAGE
        )
    except KeyboardInterrupt:
        way_on = "; what was saved stays, `--resume auto` goes on from the last checkpoint" if resumable else ""
        return _fail(f"interrupted{way_on}", EXIT_INTERRUPTED)
    except Exception as error:
        if not isinstance(error, _expected_errors()):
            raise
        print(f"quartet: {error}", file=sys.stderr)
        return EXIT_STOPPED if type(error).__name__ == "Stopped" else EXIT_ERROR


def _expected_errors() -> tuple[type[Exception], ...]:
    """Errors whose message is written for the user; anything else is a bug and keeps its traceback."""
    from grpo.checkpoint import CheckpointError
    from grpo.learner import NonFiniteStep
    from grpo.train import Stopped
    from policies.convert import ParityFailed
    from rewards.protocol import RewardError
    from rollout.engine import RolloutError

    return CheckpointError, NonFiniteStep, ParityFailed, RewardError, RolloutError, Stopped, ValueError, OSError


def _fail(message: str, code: int) -> int:
    print(f"quartet: {message}", file=sys.stderr)
    return code


def build_parser() -> argparse.ArgumentParser:
    from grpo.config import SftConfig, TrainConfig
    from grpo.inference_config import EvalConfig, SampleConfig
    from grpo.options import add_options

    parser = argparse.ArgumentParser(
        prog="quartet", description="GRPO for MoE/MLA language models with lossless multi-token rollouts."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    sft = commands.add_parser(
        "sft", help="supervised fine-tuning on prompts and gold solutions", description=SftConfig.__doc__
    )
    _add_config(sft)
    add_options(sft, SftConfig)
    sft.set_defaults(command=_sft)

    train = commands.add_parser("train", help="GRPO, after an optional warm start", description=TrainConfig.__doc__)
    _add_config(train)
    train.add_argument(
        "--resume", metavar="auto|PATH", help="go on from the newest checkpoint of output_dir, or from this one"
    )
    train.add_argument("--force", action="store_true", help="resume although the configuration has changed")
    train.add_argument(
        "--stop_after", "--stop-after", type=int, metavar="N", help="save and stop after step N, as if interrupted"
    )
    add_options(train, TrainConfig)
    train.set_defaults(command=_train)

    evaluate = commands.add_parser(
        "eval", help="accuracy of a policy on held-out problems", description=EvalConfig.__doc__
    )
    evaluate.add_argument("policy", metavar="MODEL", help="a run folder, a checkpoint folder or a hub id")
    evaluate.add_argument("--print_config", "--print-config", action="store_true", help="print the options and stop")
    evaluate.add_argument("--json", type=Path, metavar="OUT", help="write what the table shows to this file")
    add_options(evaluate, EvalConfig)
    evaluate.set_defaults(command=_eval)

    sample = commands.add_parser("sample", help="completions of prompts from a file", description=SampleConfig.__doc__)
    sample.add_argument("policy", metavar="MODEL", help="a checkpoint folder, a run folder or a hub id")
    sample.add_argument(
        "--prompts", type=Path, required=True, metavar="FILE.jsonl", help='lines such as {"prompt": "2 + 3 = ?"}'
    )
    sample.add_argument("--json", type=Path, metavar="OUT", help="write groups and completions to this file")
    add_options(sample, SampleConfig)
    sample.set_defaults(command=_sample)

    convert = commands.add_parser("convert", help="a dense Llama-family checkpoint as DeepSeek-V3 (MLA), exactly")
    convert.add_argument("source", metavar="SRC", help="a checkpoint folder or a hub id")
    convert.add_argument("destination", type=Path, metavar="DST", help="the folder to write; it must not exist")
    convert.set_defaults(command=_convert)

    plot = commands.add_parser("plot", help="draw the curves of a run into its folder")
    plot.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    plot.set_defaults(command=_plot)

    reference = commands.add_parser("reference", help="print the reference page of all options and metrics")
    reference.set_defaults(command=_reference)
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config", type=Path, nargs="?", metavar="CONFIG.yaml", help="options from a file; the command line wins"
    )
    parser.add_argument(
        "--print_config", "--print-config", action="store_true", help="print the effective options and stop"
    )
    parser.add_argument(
        "--dry_run", "--dry-run", action="store_true", help="check all that can be checked without training, and stop"
    )


def _sft(args: argparse.Namespace) -> int:
    from grpo.config import SftConfig

    if config := _config_to_run(args, SftConfig):
        from grpo import report
        from grpo.sft import sft

        report.summary(sft(config))
    return 0


def _train(args: argparse.Namespace) -> int:
    from grpo.config import TrainConfig

    if config := _config_to_run(args, TrainConfig):
        from grpo import report
        from grpo.train import Trainer

        report.summary(Trainer(config, resume=args.resume, stop_after=args.stop_after, force=args.force).run())
    return 0


def _config_to_run(args: argparse.Namespace, model: type[Config]) -> Config | None:
    """The configuration, or None where it was only to be printed or checked, which then is done."""
    from grpo.options import dump_yaml, load

    config = load(model, args.config, args.overrides, args.flags)
    if args.print_config:
        print(dump_yaml(config), end="")
    elif args.dry_run:
        from grpo import report

        report.dry_run(config)
    else:
        return config
    return None


def _eval(args: argparse.Namespace) -> int:
    from grpo.inference_config import EvalConfig, defaults_of_run
    from grpo.options import dump_yaml, load

    defaults = defaults_of_run(Path(args.policy))
    config = load(EvalConfig, None, defaults | {"model": args.policy} | args.overrides, args.flags)
    if args.print_config:
        print(dump_yaml(config), end="")
        return 0
    from grpo import report
    from grpo.evaluate import evaluate_model

    results = evaluate_model(config, report.CONSOLE)
    report.evaluations(results)
    _write(args.json, report.evaluations_as_json(config.model, config.data, results))
    return 0


def _sample(args: argparse.Namespace) -> int:
    from grpo.inference_config import SampleConfig
    from grpo.options import load

    config = load(SampleConfig, None, args.overrides | {"model": args.policy}, args.flags)
    from grpo import report
    from grpo.sample import read_prompts, sample

    groups = sample(config, read_prompts(args.prompts))
    report.groups(groups)
    _write(args.json, {"groups": report.groups_as_json(groups)})
    return 0


def _convert(args: argparse.Namespace) -> int:
    from policies.convert import convert_checkpoint

    print(convert_checkpoint(args.source, args.destination))
    print(f"written to {args.destination}")
    return 0


def _plot(args: argparse.Namespace) -> int:
    from grpo.plots import plot_run

    for path in plot_run(args.run):
        print(path)
    return 0


def _reference(args: argparse.Namespace) -> int:
    from grpo.config import SftConfig, TrainConfig
    from grpo.inference_config import EvalConfig, SampleConfig
    from grpo.metrics import table
    from grpo.options import reference_page

    for command, model in (("train", TrainConfig), ("sft", SftConfig), ("eval", EvalConfig), ("sample", SampleConfig)):
        print(f"# quartet {command}\n\n{reference_page(model)}")
    print(f"# Metrics\n\n{table()}", end="")
    return 0


def _write(path: Path | None, content: dict[str, Any]) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    print(f"written to {path}")

"""`quartet`: sft, mtp, train, eval, sample, convert. Parsing and printing only; the work is done elsewhere.

Modules that load transformers or Ray are imported inside the commands, so that --help and a typo answer at once.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from grpo.run.escape import EscapingFormatter, escaped
from grpo.run.stop import CommandSignals, Interrupted, Stopped, said_of
from policies.openmp import wait_briefly

if TYPE_CHECKING:
    from grpo.config.run import SftConfig

Config = TypeVar("Config", bound="SftConfig")
EXIT_ERROR, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    wait_briefly()  # before anything loads torch
    with CommandSignals() as signals:
        try:
            return _main(argv, signals)
        except Exception:
            if not signals.number:
                raise
            return _fail(said_of(signals.number), 128 + signals.number)  # an interrupted import may raise anything


def _main(argv: Sequence[str] | None, signals: CommandSignals) -> int:
    from grpo.config.options import ConfigError, parse
    from rewards.protocol import RewardError

    if logging.lastResort is not None:
        logging.lastResort.setFormatter(EscapingFormatter())
    parser, resumable = build_parser(), False
    try:
        args = parse(parser, argv)
        resumable = args.command in (_train, _sft, _mtp)
        signals.unwinds = not resumable  # a run has a StopSignal of its own as soon as there is something to save
        return int(args.command(args) or 0)
    except ConfigError as error:
        return _fail(
            "the configuration is not usable:\n" + "\n".join(f"  {line}" for line in error.problems), EXIT_USAGE
        )
    except KeyboardInterrupt as error:
        if isinstance(error, Interrupted):
            return _fail(str(error), 128 + error.number)
        way_on = "; what was saved stays, `--resume auto` goes on from the last checkpoint" if resumable else ""
        return _fail(f"interrupted{way_on}", EXIT_INTERRUPTED)
    except Exception as error:
        # The first three are here already; the others take seconds to import.
        if not isinstance(error, ValueError | OSError | RewardError) and not isinstance(error, _expected_errors()):
            raise
        code = 128 + error.number if isinstance(error, Stopped) else EXIT_ERROR
        return _fail(f"{_option_of(error, args)}{error}", code)


def _expected_errors() -> tuple[type[Exception], ...]:
    """Errors whose message is written for the user; anything else is a bug and keeps its traceback."""
    from grpo.commands.recovery import RecoveryDiverged
    from grpo.learner.learner import NonFiniteStep
    from grpo.learner.parallel import RankFailed
    from grpo.run.checkpoint import CheckpointError
    from policies.conversion.parity import ParityFailed
    from rollout.engine import RolloutError

    return CheckpointError, NonFiniteStep, ParityFailed, RankFailed, RecoveryDiverged, RolloutError, Stopped


def _option_of(error: Exception, args: argparse.Namespace) -> str:
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


def _fail(message: str, code: int) -> int:
    """The one place that prints errors. They quote what others wrote: rewards, column names, checkpoints."""
    print(escaped(f"quartet: {message}"), file=sys.stderr)
    return code


def build_parser() -> argparse.ArgumentParser:
    from grpo.config.inference import EvalConfig, SampleConfig
    from grpo.config.options import add_options
    from grpo.config.run import SftConfig, TrainConfig

    parser = argparse.ArgumentParser(
        prog="quartet", description="GRPO for MoE/MLA language models with lossless multi-token rollouts."
    )
    parser.add_argument("--version", action="version", version=f"quartet {_version()}")
    commands = _add_commands(parser)

    sft = commands.add_parser(
        "sft", help="supervised fine-tuning on prompts and gold solutions", description=SftConfig.__doc__
    )
    _add_config(sft)
    _add_resume(sft)
    add_options(sft, SftConfig)
    sft.set_defaults(command=_sft)

    _add_mtp(commands)

    train = commands.add_parser("train", help="GRPO, after an optional warm start", description=TrainConfig.__doc__)
    _add_config(train)
    _add_resume(train)
    add_options(train, TrainConfig)
    train.set_defaults(command=_train)

    evaluate = commands.add_parser(
        "eval", help="accuracy or mean reward of a policy on held-out problems", description=EvalConfig.__doc__
    )
    evaluate.add_argument("policy", metavar="MODEL", help="a run folder, a checkpoint folder or a hub id")
    evaluate.add_argument("--print_config", "--print-config", action="store_true", help="print the options and stop")
    evaluate.add_argument("--json", type=Path, metavar="OUT", help="write what the table shows to this file")
    add_options(evaluate, EvalConfig)
    evaluate.set_defaults(command=_eval)

    sample = commands.add_parser("sample", help="completions of your own prompts", description=SampleConfig.__doc__)
    sample.add_argument("policy", metavar="MODEL", help="a checkpoint folder, a run folder or a hub id")
    sample.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="a prompt; give it again for another one"
    )
    sample.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE.jsonl|-",
        help='lines such as {"prompt": "2 + 3 = ?"}; - reads standard input, where a line may also be plain text',
    )
    sample.add_argument("--json", type=Path, metavar="OUT", help="write groups and completions to this file")
    add_options(sample, SampleConfig)
    sample.set_defaults(command=_sample)

    _add_convert(commands)

    policy = commands.add_parser("policy", help="what a policy is made of")
    kinds = _add_commands(policy)
    inspect = kinds.add_parser(
        "inspect", help="parameters, cache and FLOPs per token, experts, MTP layers, LoRA's share"
    )
    inspect.add_argument("model", metavar="MODEL", help="a preset, a run folder, a checkpoint folder or a hub id")
    inspect.add_argument(
        "--context",
        type=int,
        metavar="TOKENS",
        help="attend to so many tokens; 4096 or the policy's longest by default",
    )
    inspect.add_argument("--json", type=Path, metavar="OUT", help="write what the table shows to this file")
    inspect.set_defaults(command=_inspect)

    export = commands.add_parser(
        "export", help="a run's policy for other tools, with tokenizer, licence and model card"
    )
    export.add_argument("run", type=Path, metavar="RUN", help="a run folder, or a checkpoint inside one")
    export.add_argument("destination", type=Path, metavar="DST", help="the folder to write; it must not exist")
    export.add_argument("--adapter", action="store_true", help="the adapters of a LoRA run alone, in peft's format")
    export.set_defaults(command=_export)

    plot = commands.add_parser("plot", help="draw the curves of a run into its folder")
    plot.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    plot.set_defaults(command=_plot)

    _add_reward(commands)

    reference = commands.add_parser("reference", help="print the reference page of all options and metrics")
    reference.set_defaults(command=_reference)
    return parser


def _add_commands(parser: argparse.ArgumentParser) -> Any:
    """Places for commands; without one of them the parser's help is printed."""
    parser.set_defaults(command=lambda _: parser.print_help())
    return parser.add_subparsers(title="commands", metavar="COMMAND")


def _version() -> str:
    try:
        return metadata.version("quartet-rl")
    except metadata.PackageNotFoundError:
        return "(run from its source, not installed)"


def _add_convert(commands: Any) -> None:
    from grpo.config.convert import ConvertConfig
    from grpo.config.options import add_options

    convert = commands.add_parser(
        "convert",
        help="a dense Llama-family checkpoint as DeepSeek-V3",
        description=ConvertConfig.__doc__,
    )
    convert.add_argument("source", metavar="SRC", help="a checkpoint folder or a hub id")
    convert.add_argument("destination", type=Path, metavar="DST", help="the folder to write; it must not exist")
    convert.add_argument("--mtp", action="store_true", help="add a draft head, started from the last layer")
    convert.add_argument("--json", type=Path, metavar="OUT", help="write what is printed to this file")
    add_options(convert, ConvertConfig)
    convert.set_defaults(command=_convert)


def _add_mtp(commands: Any) -> None:
    from grpo.config.mtp import MtpConfig
    from grpo.config.options import add_options

    mtp = commands.add_parser("mtp", help="teach the draft head what the policy says", description=MtpConfig.__doc__)
    mtp.add_argument(
        "config",
        type=Path,
        nargs="?",
        metavar="CONFIG.yaml|MODEL",
        help="options from a file (the command line wins), or the policy: a run or checkpoint folder, or a hub id",
    )
    _add_checks(mtp)
    _add_resume(mtp)
    add_options(mtp, MtpConfig)
    mtp.set_defaults(command=_mtp)


def _add_reward(commands: Any) -> None:
    from grpo.config.options import add_options
    from grpo.config.reward_commands import ReplayConfig, RewardTestConfig

    reward = commands.add_parser("reward", help="try a reward function, or score a run again with another one")
    kinds = _add_commands(reward)

    test = kinds.add_parser(
        "test", help="gold, empty, wrong and hostile completions", description=RewardTestConfig.__doc__
    )
    test.add_argument("function", metavar="FILE:FN", help="path/to/file.py:function, or a built-in reward's name")
    test.add_argument("--json", type=Path, metavar="OUT", help="write what was found to this file")
    add_options(test, RewardTestConfig)
    test.set_defaults(command=_reward_test)

    replay = kinds.add_parser("replay", help="score a run's completions again", description=ReplayConfig.__doc__)
    replay.add_argument("run", type=Path, metavar="RUN", help="a run folder; nothing in it is touched")
    replay.add_argument(
        "--with", dest="function", required=True, metavar="FILE:FN", help="the function, or a built-in reward's name"
    )
    replay.add_argument("--json", type=Path, metavar="OUT", help="write every change to this file")
    add_options(replay, ReplayConfig)
    replay.set_defaults(command=_reward_replay)


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config", type=Path, nargs="?", metavar="CONFIG.yaml", help="options from a file; the command line wins"
    )
    _add_checks(parser)


def _add_checks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--print_config", "--print-config", action="store_true", help="print the effective options and stop"
    )
    parser.add_argument(
        "--dry_run", "--dry-run", action="store_true", help="check all that can be checked without training, and stop"
    )


def _sft(args: argparse.Namespace) -> int:
    from grpo.config.run import SftConfig

    return _run(args, SftConfig)


def _train(args: argparse.Namespace) -> int:
    from grpo.config.run import TrainConfig

    return _run(args, TrainConfig)


def _run(args: argparse.Namespace, model: type[SftConfig]) -> int:
    if config := _config_to_run(args, model):
        from grpo.commands import summary
        from grpo.launch import launch

        results = launch(config, resume=args.resume, stop_after=args.stop_after, force=args.force)
        if results is not None:
            summary.summary(results)
    return 0


def _mtp(args: argparse.Namespace) -> int:
    from grpo.config.mtp import MtpConfig, defaults_of_run
    from grpo.config.options import dump_yaml, load

    file: Path | None = args.config
    if file is not None and file.suffix not in (".yaml", ".yml"):
        args.overrides = defaults_of_run(file) | {"model": str(file)} | args.overrides
        file = None
    config = load(MtpConfig, file, args.overrides, args.flags)
    args.output_dir = config.output_dir
    if args.print_config:
        print(dump_yaml(config), end="")
        return 0
    from grpo import mtp
    from grpo.commands import summary
    from grpo.run.log import refuse_folder

    if args.dry_run:
        refuse_folder(config.output_dir, resuming=args.resume is not None)
        devices, disk = mtp.dry_run(config, summary.CONSOLE)
        summary.show_memory(devices, config, disk, summary.CONSOLE)
        return 0
    summary.summary(mtp.mtp(config, resume=args.resume, stop_after=args.stop_after, force=args.force))
    return 0


def _add_resume(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--resume", metavar="auto|PATH", help="go on from the newest checkpoint of output_dir, or from this one"
    )
    parser.add_argument("--force", action="store_true", help="resume although the configuration has changed")
    parser.add_argument(
        "--stop_after", "--stop-after", type=int, metavar="N", help="save and stop after step N, as if interrupted"
    )


def _config_to_run(args: argparse.Namespace, model: type[Config]) -> Config | None:
    """The configuration, or None where it was only to be printed or checked, which then is done."""
    from grpo.config.options import dump_yaml, load

    config = load(model, args.config, args.overrides, args.flags)
    args.output_dir = config.output_dir
    if args.print_config:
        print(dump_yaml(config), end="")
    elif args.dry_run:
        from grpo.commands import summary

        summary.dry_run(config, resume=args.resume, stop_after=args.stop_after, force=args.force)
    else:
        return config
    return None


def _eval(args: argparse.Namespace) -> int:
    from grpo.config.inference import EvalConfig, defaults_of_run
    from grpo.config.options import dump_yaml, load

    defaults = defaults_of_run(Path(args.policy), args.overrides.get("data"))
    config = load(EvalConfig, None, defaults | {"model": args.policy} | args.overrides, args.flags)
    if args.print_config:
        print(dump_yaml(config), end="")
        return 0
    from grpo.commands import eval_report, summary
    from grpo.commands.eval import evaluate_model

    evaluation = evaluate_model(config, summary.CONSOLE)
    eval_report.show(evaluation, summary.CONSOLE)
    _write(args.json, eval_report.as_json(evaluation))
    return EXIT_ERROR if evaluation.without_any_mark else 0


def _sample(args: argparse.Namespace) -> int:
    if not args.prompt and args.prompts is None:
        args.options_parser.error('there are no prompts: give --prompt "some text", --prompts FILE.jsonl, --prompts -')
    from grpo.config.inference import SampleConfig, sample_defaults_of_run
    from grpo.config.options import load

    brought = sample_defaults_of_run(Path(args.policy), args.overrides.get("data"))
    config = load(SampleConfig, None, brought | {"model": args.policy} | args.overrides, args.flags)
    from grpo.commands import summary
    from grpo.commands.sample import prompts_of, sample

    examples = prompts_of(args.prompt, args.prompts)
    if brought and "template" not in args.overrides:
        shots = f" and {config.few_shot} worked examples" if config.few_shot else ""
        print(f"prompts are written as in the run: template {config.template!r}{shots}")
    sampled = sample(config, examples, summary.CONSOLE)
    summary.groups(sampled.groups, sampled.tokenizer)
    _write(args.json, {"groups": summary.groups_as_json(sampled.groups)})
    return _fail(sampled.faults, EXIT_ERROR) if sampled.faults else 0


def _convert(args: argparse.Namespace) -> int:
    from grpo.config.convert import ConvertConfig
    from grpo.config.options import load

    config = load(ConvertConfig, None, args.overrides, args.flags)
    from grpo.commands import convert, summary

    conversion = convert.convert(args.source, args.destination, config, mtp=args.mtp, console=summary.CONSOLE)
    convert.show(conversion, summary.CONSOLE)
    _write(args.json, convert.as_json(conversion))
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from grpo.commands import inspect, summary

    anatomy = inspect.inspect(args.model, args.context)
    summary.CONSOLE.print(inspect.table(args.model, anatomy))
    _write(args.json, inspect.as_json(args.model, anatomy))
    return 0


def _export(args: argparse.Namespace) -> int:
    from grpo.commands.export import export

    print(escaped(export(args.run, args.destination, adapter=args.adapter)))
    return 0


def _plot(args: argparse.Namespace) -> int:
    if not args.run.is_dir():
        raise ValueError(f"RUN={args.run}: there is no such folder")
    if not (args.run / "metrics.jsonl").is_file():
        raise ValueError(f"RUN={args.run}: is no run folder (no metrics.jsonl in it)")
    from grpo.run.plots import plot_run

    for path in plot_run(args.run):
        print(path)
    return 0


def _reward_test(args: argparse.Namespace) -> int:
    from grpo.config.options import load
    from grpo.config.reward_commands import RewardTestConfig

    config = load(RewardTestConfig, None, args.overrides, args.flags)
    from dataclasses import asdict

    from grpo.commands.reward_report import show_check
    from grpo.commands.reward_test import check_reward
    from grpo.run.console import Terminal

    check = check_reward(args.function, config)
    show_check(check, Terminal())
    _write(args.json, asdict(check))
    return EXIT_ERROR if check.problems else 0


def _reward_replay(args: argparse.Namespace) -> int:
    from grpo.config.options import load
    from grpo.config.reward_commands import ReplayConfig

    config = load(ReplayConfig, None, args.overrides, args.flags)
    from dataclasses import asdict

    from grpo.commands.reward_replay import replay
    from grpo.commands.reward_report import show_replay
    from grpo.run.console import Terminal

    result = replay(args.run, args.function, config)
    show_replay(result, Terminal())
    _write(args.json, asdict(result))
    return EXIT_ERROR if result.failures else 0


def _reference(args: argparse.Namespace) -> int:
    from pydantic import BaseModel

    from grpo.config.convert import ConvertConfig
    from grpo.config.inference import EvalConfig, SampleConfig
    from grpo.config.mtp import MtpConfig
    from grpo.config.options import reference_page
    from grpo.config.reward_commands import ReplayConfig, RewardTestConfig
    from grpo.config.run import SftConfig, TrainConfig
    from grpo.run.metrics import table

    commands: dict[str, type[BaseModel]] = {
        **{"train": TrainConfig, "sft": SftConfig, "mtp": MtpConfig, "eval": EvalConfig, "sample": SampleConfig},
        **{"reward test": RewardTestConfig, "reward replay": ReplayConfig, "convert": ConvertConfig},
    }
    for command, model in commands.items():
        print(f"# quartet {command}\n\n{reference_page(model)}")
    print(f"# Metrics\n\n{table()}", end="")
    return 0


def _write(path: Path | None, content: dict[str, Any]) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    path.write_text(f"{text}\n", encoding="utf-8", errors="backslashreplace")  # lone surrogates, as JSON escapes
    print(f"written to {path}")

"""`quartet`: the table of its commands, parsing and printing. The work is done in train, sft, mtp and commands/.

Modules that load transformers or Ray are imported inside the commands, so that --help and a typo answer at once.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from grpo.config import arguments
from grpo.error_lines import expected_errors, fail, option_of
from grpo.run.escape import EscapingFormatter, escaped
from grpo.run.stop import CommandSignals, Interrupted, Stopped, said_of
from policies.openmp import wait_briefly

if TYPE_CHECKING:
    from pydantic import BaseModel

EXIT_ERROR, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    wait_briefly()  # before anything loads torch
    with CommandSignals() as signals:
        try:
            return _main(argv, signals)
        except Exception:
            if not signals.number:
                raise
            return fail(said_of(signals.number), 128 + signals.number)  # an interrupted import may raise anything


def _main(argv: Sequence[str] | None, signals: CommandSignals) -> int:
    from grpo.config.options import ConfigError, parse
    from rewards.protocol import RewardError

    if logging.lastResort is not None:
        logging.lastResort.setFormatter(EscapingFormatter())
    parser, resumable = build_parser(), False
    try:
        args = parse(parser, argv)
        resumable = args.command in (_run, _mtp)
        signals.unwinds = not resumable  # a run has a StopSignal of its own as soon as there is something to save
        return int(args.command(args) or 0)
    except ConfigError as error:
        return fail("\n  ".join(["the configuration is not usable:", *error.problems]), EXIT_USAGE)
    except KeyboardInterrupt as error:
        if isinstance(error, Interrupted):
            return fail(str(error), 128 + error.number)
        way_on = "; what was saved is kept, and `--resume auto` continues from the last checkpoint" if resumable else ""
        return fail(f"interrupted{way_on}", EXIT_INTERRUPTED)
    except Exception as error:
        # The first three are here already; the others take seconds to import.
        if not isinstance(error, ValueError | OSError | RewardError) and not isinstance(error, expected_errors()):
            raise
        code = 128 + error.number if isinstance(error, Stopped) else EXIT_ERROR
        return fail(f"{option_of(error, args)}{error}", code)


class Command(NamedTuple):
    """A row of the table: what `quartet NAME` is for, which function runs it, its arguments and its options."""

    help: str
    run: Callable[[argparse.Namespace], int | None]
    takes: Sequence[arguments.Argument] = ()
    options: type[BaseModel] | None = None


def _commands() -> dict[str, Command]:
    """Every command by its name, in the order of --help and of the reference page."""
    from grpo.config.convert import ConvertConfig
    from grpo.config.inference import EvalConfig, SampleConfig
    from grpo.config.mtp import MtpConfig
    from grpo.config.reward_commands import ReplayConfig, RewardTestConfig
    from grpo.config.run import SftConfig, TrainConfig
    from grpo.config.serve import ServeConfig

    return {
        "train": Command("GRPO, after an optional warm start", _run, arguments.TRAIN, TrainConfig),
        "sft": Command("supervised fine-tuning on prompts and gold solutions", _run, arguments.TRAIN, SftConfig),
        "mtp": Command("teach the draft head what the policy says", _mtp, arguments.MTP, MtpConfig),
        "eval": Command("accuracy or mean reward of a policy on held-out problems", _eval, arguments.EVAL, EvalConfig),
        "sample": Command("completions of your own prompts", _sample, arguments.SAMPLE, SampleConfig),
        "serve": Command("a policy for other programs, by OpenAI's API", _serve, arguments.SERVE, ServeConfig),
        "reward": Command("try a reward function, or score a run again with another one", _help),
        "reward test": Command(
            "gold, empty, wrong and hostile completions", _reward_test, arguments.REWARD_TEST, RewardTestConfig
        ),
        "reward replay": Command(
            "score a run's completions again", _reward_replay, arguments.REWARD_REPLAY, ReplayConfig
        ),
        "convert": Command(
            "a dense Llama-family checkpoint as DeepSeek-V3", _convert, arguments.CONVERT, ConvertConfig
        ),
        "policy": Command("what a policy is made of", _help),
        "policy inspect": Command(
            "parameters, cache and FLOPs per token, experts, MTP layers, LoRA's share", _inspect, arguments.INSPECT
        ),
        "export": Command(
            "a run's policy for other tools, with tokenizer, licence and model card", _export, arguments.EXPORT
        ),
        "plot": Command("draw the curves of a run into its folder", _plot, arguments.PLOT),
        "view": Command("a page of one or more runs, live while they run", _view, arguments.VIEW),
        "report": Command("the same page as one HTML file to send away", _report, arguments.REPORT),
        "reference": Command("print the reference page of all options and metrics", _reference),
    }


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands. `args.command` is the function to call, `args.options` the class of the options."""
    from grpo.config.options import add_options

    parser = argparse.ArgumentParser(
        prog="quartet", description="GRPO for MoE/MLA language models with lossless multi-token rollouts."
    )
    parser.add_argument("--version", action="version", version=f"quartet {_version()}")
    groups = {"": _add_group(parser)}
    for name, command in _commands().items():
        group, _, last = name.rpartition(" ")
        options = command.options
        sub = groups[group].add_parser(last, help=command.help, description=options.__doc__ if options else None)
        if command.run is _help:
            groups[name] = _add_group(sub)
            continue
        for names, settings in command.takes:
            sub.add_argument(*names, **settings)
        if options:
            add_options(sub, options)
        sub.set_defaults(command=command.run, options=options)
    return parser


def _add_group(parser: argparse.ArgumentParser) -> Any:
    """Places for commands; without one of them the parser's help is printed."""
    parser.set_defaults(command=lambda _: _help(parser))
    return parser.add_subparsers(title="commands", metavar="COMMAND")


def _help(parser: Any) -> None:
    parser.print_help()


def _version() -> str:
    try:
        return metadata.version("quartet-rl")
    except metadata.PackageNotFoundError:
        return "(run from its source, not installed)"


def _load(args: argparse.Namespace, file: Path | None = None, brought: Mapping[str, Any] | None = None) -> Any:
    """The command's options: their defaults, then those of them that a run folder brings, the file, the command line.

    None where they were only to be printed, which then is done.
    """
    from grpo.config.options import dump_yaml, load

    known = {name: value for name, value in (brought or {}).items() if name in args.options.model_fields}
    config: Any = load(args.options, file, known | args.overrides, args.flags)
    if getattr(args, "print_config", False):
        print(dump_yaml(config), end="")
        return None
    args.output_dir = getattr(config, "output_dir", None)
    return config


def _flags(args: argparse.Namespace) -> dict[str, Any]:
    return {"resume": args.resume, "stop_after": args.stop_after, "force": args.force}


def _run(args: argparse.Namespace) -> None:
    config = _load(args, args.config)
    if config is None:
        return
    from grpo.commands import summary

    if args.dry_run:
        return summary.dry_run(config, device_gib=args.device_gib, **_flags(args))
    from grpo.launch import launch

    results = launch(config, **_flags(args))
    if results is not None:
        summary.summary(results)


def _mtp(args: argparse.Namespace) -> None:
    from grpo.config.mtp import defaults_of_run

    file: Path | None = args.config
    if file is None or file.suffix in (".yaml", ".yml"):
        config = _load(args, file)
    else:
        config = _load(args, brought=defaults_of_run(file) | {"model": str(file)})
    if config is None:
        return
    from grpo.commands import summary

    if args.dry_run:
        return summary.mtp_dry_run(config, resuming=args.resume is not None, device_gib=args.device_gib)
    from grpo.mtp import mtp

    summary.summary(mtp(config, **_flags(args)))


def _eval(args: argparse.Namespace) -> int:
    from grpo.config.inference import defaults_of_run

    first = args.policies[0]
    brought = defaults_of_run(Path(first), args.overrides.get("data"))
    config = _load(args, brought=brought | {"model": first})
    if config is None:
        return 0
    from grpo.commands import eval_report, summary
    from grpo.commands.eval import ModelEvaluation, evaluate_model

    found: list[ModelEvaluation] = []
    for policy in args.policies:
        output = config.output and config.output / str(len(found)) if found else config.output
        own = config.model_copy(update={"model": policy, "output": output})
        found.append(evaluate_model(own, summary.CONSOLE, args.policies[len(found) + 1 :]))
        eval_report.show(found[-1], summary.CONSOLE)
    if len(found) > 1:
        eval_report.show_paired(found[0], found[1:], summary.CONSOLE)
    _write(args.json, eval_report.as_json(found[0]) if len(found) == 1 else eval_report.paired_as_json(found))
    return EXIT_ERROR if any(evaluation.without_any_mark for evaluation in found) else 0


def _sample(args: argparse.Namespace) -> int:
    if not args.prompt and args.prompts is None:
        args.options_parser.error('there are no prompts: give --prompt "some text", --prompts FILE.jsonl, --prompts -')
    from grpo.config.inference import defaults_of_run

    brought = defaults_of_run(Path(args.policy), args.overrides.get("data"))
    config = _load(args, brought=brought | {"model": args.policy})
    from grpo.commands import summary
    from grpo.commands.sample import prompts_of, sample

    examples = prompts_of(args.prompt, args.prompts)
    if brought and "template" not in args.overrides:
        shots = f" and {config.few_shot} worked examples" if config.few_shot else ""
        print(f"prompts are written as in the run: template {config.template!r}{shots}")
    sampled = sample(config, examples, summary.CONSOLE)
    summary.groups(sampled.groups, sampled.tokenizer)
    _write(args.json, {"groups": summary.groups_as_json(sampled.groups)})
    return fail(sampled.faults, EXIT_ERROR) if sampled.faults else 0


def _serve(args: argparse.Namespace) -> None:
    from grpo.config.inference import defaults_of_run

    config = _load(args, brought=defaults_of_run(Path(args.policy)) | {"model": args.policy})
    if config is None:
        return
    from grpo.serve.server import serve

    serve(config, follow=args.follow)


def _convert(args: argparse.Namespace) -> None:
    config = _load(args)
    from grpo.commands import convert, summary

    conversion = convert.convert(args.source, args.destination, config, mtp=args.mtp, console=summary.CONSOLE)
    convert.show(conversion, summary.CONSOLE)
    _write(args.json, asdict(conversion))


def _inspect(args: argparse.Namespace) -> None:
    from grpo.commands import inspect, summary

    anatomy = inspect.inspect(args.model, args.context)
    summary.CONSOLE.print(inspect.table(args.model, anatomy))
    _write(args.json, inspect.as_json(args.model, anatomy))


def _export(args: argparse.Namespace) -> None:
    from grpo.commands.push import run_export

    print(escaped(run_export(args.run, args.destination, args.push_to_hub, adapter=args.adapter)))


def _plot(args: argparse.Namespace) -> None:
    if not args.run.is_dir():
        raise ValueError(f"RUN={args.run}: there is no such folder")
    if not (args.run / "metrics.jsonl").is_file():
        raise ValueError(f"RUN={args.run}: is no run folder (no metrics.jsonl in it)")
    from grpo.run.plots import plot_run

    print(*plot_run(args.run), sep="\n")


def _view(args: argparse.Namespace) -> None:
    from grpo.view.server import view

    view(args.runs, args.host, args.port)


def _report(args: argparse.Namespace) -> None:
    from grpo.view.report import report

    print(report(args.run, args.output or args.run / "report.html", args.steps))


def _reward_test(args: argparse.Namespace) -> int:
    config = _load(args)
    from grpo.commands.reward_report import show_check
    from grpo.commands.reward_test import check_reward
    from grpo.run.console import Terminal

    check = check_reward(args.function, config)
    show_check(check, Terminal())
    _write(args.json, asdict(check))
    return EXIT_ERROR if check.problems else 0


def _reward_replay(args: argparse.Namespace) -> int:
    config = _load(args)
    from grpo.commands.reward_replay import replay
    from grpo.commands.reward_report import show_replay
    from grpo.run.console import Terminal

    result = replay(args.run, args.function, config)
    show_replay(result, Terminal())
    _write(args.json, asdict(result))
    return EXIT_ERROR if result.failures else 0


def _reference(args: argparse.Namespace) -> None:
    from grpo.config.options import reference_page
    from grpo.run.metrics import table

    for name, command in _commands().items():
        if command.options:
            print(f"# quartet {name}\n\n{reference_page(command.options)}")
    print(f"# Metrics\n\n{table()}", end="")


def _write(path: Path | None, content: dict[str, Any]) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    path.write_text(f"{text}\n", encoding="utf-8", errors="backslashreplace")  # lone surrogates, as JSON escapes
    print(f"written to {path}")

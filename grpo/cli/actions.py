"""What each command of `quartet` does, from its parsed arguments to what it prints. The rooms that do the work are
imported inside the functions: they load transformers or Ray."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewards.commands.command_line import EXIT_ERROR, EXIT_USAGE, fail, print_error, write
from rewards.isolation.output import escaped

if TYPE_CHECKING:
    from grpo.cli.migration.migration import Migration
    from grpo.config.mtp import MtpConfig
    from grpo.config.run import RunConfig, SftConfig, TrainConfig
    from rewards.finding import Report


def _load(args: argparse.Namespace, brought: Mapping[str, Any] | None = None) -> Any:
    """Returns the options: of the command, a run folder, the file, the command line. None: they were only to be
    printed."""
    from rewards.config.options import dump_yaml, load

    known = _of_command(args.options, brought or {})
    on_removed = print_error if getattr(args, "resume", None) else None
    file = getattr(args, "config", None)
    config: Any = load(args.options, file, known | args.overrides, args.flags, on_removed=on_removed)
    if getattr(args, "print_config", False):
        print(dump_yaml(config), end="")
        return None
    args.output_dir = config.output_dir if "output_dir" in args.options.model_fields else None
    return config


def _of_command(options: type[RunConfig], brought: Mapping[str, Any]) -> dict[str, Any]:
    """Returns those options of a run that the command has, too."""
    known = {name: value for name, value in brought.items() if name in options.model_fields}
    defaults = options.model_construct()
    for name in {"data", "rollout", "eval"} & set(known):
        default, sources = getattr(defaults, name), known[name]
        section = type(default[0] if isinstance(default, list) else default).model_fields
        if isinstance(sources, list):
            known[name] = [_within(section, source) for source in sources]
        else:
            known[name] = _within(section, sources)
    return known


def _within(section: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in given.items() if key in section}


def _load_for_policy(args: argparse.Namespace, model: str) -> tuple[Any, bool]:
    """Returns the options of a command that uses the policy `model`, and whether its run folder brings some of them."""
    from grpo.cli.config.inference import defaults_of_run

    data = args.overrides.get("data.name", args.overrides.get("data"))
    brought = defaults_of_run(Path(model), data)
    return _load(args, brought | {"model": model}), bool(brought)


def _announce_loading() -> None:
    """Gives the first sign of life, before torch and transformers are loaded, which takes seconds."""
    if os.environ.get("RANK", "0") == "0":
        print("loading torch and transformers ...", flush=True)


def _names_policy(args: argparse.Namespace) -> bool:
    """Whether there is a policy to train: in a file, by its name, in the run to resume. `tiny`, the default, has random
    weights, from which GRPO learns nothing: nobody means that."""
    given = (args.config, args.overrides.get("model"), getattr(args, "resume", None), getattr(args, "verl", None))
    return any(given) or getattr(args, "print_config", False)


def _show_ways(args: argparse.Namespace, name: str) -> int:
    """Names three commands that work here, once nothing else is wrong with the options."""
    from rewards.config.options import load

    load(args.options, None, args.overrides | {"device": "cpu"}, args.flags)  # any other device is asked by torch
    demo = Path("examples/01_demo.yaml")
    first = str(demo) if demo.is_file() else "--model tiny --sft.steps 300"
    own = "--model MODEL --data.name mine.jsonl"
    ways = [f"train {first}", f"train {own} --rewards mine.py:f", f"rehearse {own} --rewards mine.py:f"]
    if name == "sft":
        ways = [f"sft {own}", "sft --model tiny --steps 300", ways[0]]
    if name == "mtp":
        ways = ["mtp runs/NAME", f"mtp {own}", ways[0]]
    lines = "\n".join(f"  quartet {way}" for way in ways)
    return fail(f"{name}: name a file or a policy, such as\n{lines}", EXIT_USAGE)


def _settle_folder(args: argparse.Namespace, config: TrainConfig | SftConfig | MtpConfig) -> None:
    """Prints the run folder if the user named none. A resumed run has one already, which must be named."""
    from rewards.config.options import ConfigError

    if "output_dir" in config.model_fields_set:
        return
    if args.resume:
        newest = max(Path("runs").glob(f"{config.command}-*"), default="runs/NAME")
        raise ConfigError([f"output_dir: --resume needs the run folder; give it, as in --output_dir {newest}"])
    if os.environ.get("RANK", "0") == "0" and not args.dry_run:
        print(f"run folder: {escaped(str(config.output_dir))}", flush=True)


def _flags(args: argparse.Namespace) -> dict[str, Any]:
    return {"resume": args.resume, "stop_after": args.stop_after, "force": args.force}


def run(args: argparse.Namespace) -> int:
    if not _names_policy(args):
        return _show_ways(args, args.options.command)
    config = _load(args)
    if config is None:
        return 0
    _settle_folder(args, config)
    _announce_loading()
    from grpo.cli.commands import summary

    if args.dry_run:
        return _publish(summary.dry_run(config, device_gib=args.device_gib, **_flags(args)))
    from grpo.cli.launch import launch

    results = launch(config, **_flags(args))
    if results is not None:
        summary.summary(results)
    return 0


def _publish(report: Report) -> int:
    from rewards.commands.printer import publish

    return publish(report, argparse.Namespace(json=None))


def rehearse(args: argparse.Namespace) -> int:
    from grpo.cli.commands.rehearsal import Rehearsal
    from rewards.commands.printer import publish

    source = args.verl or str(args.config)
    with tempfile.TemporaryDirectory(prefix="migration_") as folder:
        try:
            if not _names_policy(args):
                return _show_ways(args, "rehearse")
            migration = _read_for_others(args, Path(folder))
            config = _load(args, {"output_dir": "runs/rehearsed"} | migration.tree if migration else {})
            _announce_loading()
            from grpo.cli.commands.rehearse import rehearse

            result = rehearse(config, faults=args.faults, device_gib=args.device_gib)
            if migration:
                result.read_from(migration)
        except ValueError as error:
            result = Rehearsal(f"rehearsal of {source}")
            for problem in getattr(error, "problems", [str(error)]):  # of a ConfigError
                result.refuse(problem)
    for name, words in result.disturbed.items():
        result.facts[f"fault, {name}"] = words
    return publish(result, args)


def _read_for_others(args: argparse.Namespace, folder: Path) -> Migration | None:
    """Reads what was written for another trainer, which then takes the place of a file; None where it is ours."""
    script, args.config = args.config, None
    if args.verl or (script and script.suffix == ".sh"):
        from grpo.cli.migration.verl_command import read_verl_command

        return read_verl_command(args.verl or script)
    if script and script.suffix == ".py":
        from grpo.cli.migration.trl_script import read_trl_script

        print(f"running {script} up to its GRPOTrainer ...", flush=True)
        return read_trl_script(script, folder, shlex.split(args.arguments))
    args.config = script
    return None


def mtp(args: argparse.Namespace) -> int:
    from grpo.config.mtp import defaults_of_run

    if not _names_policy(args):
        return _show_ways(args, "mtp")
    brought, file = {}, args.config
    if file is not None and file.suffix not in (".yaml", ".yml"):
        brought, args.config = defaults_of_run(file) | {"model": str(file)}, None
    config = _load(args, brought)
    if config is None:
        return 0
    _settle_folder(args, config)
    _announce_loading()
    from grpo.cli.commands import summary

    if args.dry_run:
        return _publish(summary.mtp_dry_run(config, **_flags(args), device_gib=args.device_gib))
    from grpo.cli.mtp import mtp
    from rewards.config.problems import command_line

    with command_line():
        summary.summary(mtp(config, **_flags(args)))
    return 0


def evaluate(args: argparse.Namespace) -> int:
    config, _ = _load_for_policy(args, args.policies[0])
    if config is None:
        return 0
    _announce_loading()
    from grpo.cli.commands import eval_report, summary
    from grpo.cli.commands.eval import ModelEvaluation, evaluate_model, refuse_full

    evaluations: list[ModelEvaluation] = []
    outputs = [config.output and config.output / (str(i) if i else "") for i in range(len(args.policies))]
    for output in outputs:
        refuse_full(output)  # before the first of them is evaluated
    for number, (policy, output) in enumerate(zip(args.policies, outputs, strict=True)):
        options = config.model_copy(update={"model": policy, "output": output})
        evaluations.append(evaluate_model(options, summary.CONSOLE, args.policies[number + 1 :]))
        eval_report.show(evaluations[-1], summary.CONSOLE)
    first, *others = evaluations
    if others:
        eval_report.show_paired(first, others, summary.CONSOLE)
    write(args.json, eval_report.paired_as_json(evaluations) if others else eval_report.as_json(first))
    return EXIT_ERROR if any(evaluation.without_any_mark for evaluation in evaluations) else 0


def control(args: argparse.Namespace) -> None:
    _announce_loading()
    from grpo.cli.commands import control, summary

    result = control.control(args.run, summary.CONSOLE, args.validation)
    control.show(result, summary.CONSOLE)
    write(args.json, result)


def sample(args: argparse.Namespace) -> int:
    if not args.prompt and args.prompts is None:
        args.options_parser.error('there are no prompts: give --prompt "some text", --prompts FILE.jsonl, --prompts -')
    config, of_run = _load_for_policy(args, args.policy)
    _announce_loading()
    from grpo.cli.commands import summary
    from grpo.cli.commands.sample import prompts_of, sample

    examples = prompts_of(args.prompt, args.prompts)
    if of_run and not {"template", "data.template"} & set(args.overrides):
        shots = f" and {config.data.few_shot} worked examples" if config.data.few_shot else ""
        print(f"prompts are written as in the run: template {config.data.template!r}{shots}")
    sampled = sample(config, examples, summary.CONSOLE)
    summary.groups(sampled.groups, sampled.tokenizer)
    write(args.json, {"groups": summary.groups_as_json(sampled.groups)})
    return fail(sampled.faults, EXIT_ERROR) if sampled.faults else 0


def serve(args: argparse.Namespace) -> None:
    config, _ = _load_for_policy(args, args.policy)
    if config is None:
        return
    if args.train:
        from grpo.cli.serve.training import serve_training

        return serve_training(config)
    from grpo.cli.serve.server import serve

    serve(config, follow=args.follow)


def convert(args: argparse.Namespace) -> None:
    config = _load(args)
    _announce_loading()
    from grpo.cli.commands import convert, summary

    conversion = convert.Converter(args.source, config, mtp=args.mtp).convert(args.destination, summary.CONSOLE)
    convert.show(conversion, summary.CONSOLE)
    write(args.json, asdict(conversion))


def quantize(args: argparse.Namespace) -> None:
    config, _ = _load_for_policy(args, args.source)
    if config is None:
        return
    _announce_loading()
    from grpo.cli.commands import summary
    from grpo.cli.quantize.quantize import Quantizer, as_json, show

    result = Quantizer(config, summary.CONSOLE).quantize(args.destination)
    show(result, summary.CONSOLE)
    write(args.json, as_json(result))


def inspect(args: argparse.Namespace) -> None:
    _announce_loading()
    from grpo.cli.commands import inspect, summary

    anatomy = inspect.inspect(args.model, args.context)
    summary.CONSOLE.print(inspect.table(args.model, anatomy))
    write(args.json, inspect.as_json(args.model, anatomy))


def check(args: argparse.Namespace) -> int:
    if args.layers < 1:
        return fail(f"--layers={args.layers}: give 1 or more of each kind", EXIT_USAGE)
    _announce_loading()
    from grpo.cli.commands.check import check, report
    from rewards.commands.printer import publish

    return publish(report(args.model, check(args.model, args.layers)), args)


def export(args: argparse.Namespace) -> None:
    _announce_loading()
    from grpo.cli.commands.export import ExportError, export, export_and_push

    if args.push_to_hub is not None:
        message = export_and_push(args.run, args.destination, args.push_to_hub, adapter=args.adapter)
    elif args.destination is not None:
        message = export(args.run, args.destination, adapter=args.adapter)
    else:
        raise ExportError("name the folder to write, DST, or a repository: --push_to_hub OWNER/NAME")
    print(escaped(message))


def why(args: argparse.Namespace) -> int:
    from grpo.cli.why.report import tell
    from rewards.commands.printer import publish
    from rewards.console import Terminal

    options = {name: getattr(args, name) for name in ("group", "groups", "tokens", "held_out", "what_if")}
    return publish(tell(args.run, args.step, Terminal(), **options), args)


def from_trl(args: argparse.Namespace) -> int:
    from grpo.cli.migration.trl_script import read_trl_script

    print(f"running {args.source} up to its GRPOTrainer ...", flush=True)
    words, limits = shlex.split(args.arguments), {"processes": args.processes, "timeout_s": args.timeout_s}
    return _migrate(args, lambda folder: read_trl_script(args.source, folder, words, **limits))


def from_verl(args: argparse.Namespace) -> int:
    from grpo.cli.migration.verl_command import read_verl_command

    return _migrate(args, lambda _: read_verl_command(args.source))


def _migrate(args: argparse.Namespace, read: Callable[[Path], Migration]) -> int:
    from grpo.config.run import TrainConfig
    from rewards.config.options import ConfigError, load

    out = args.out
    if out.exists():
        return fail(f"--out={out}: it is there already; name another file", EXIT_USAGE)
    out.parent.mkdir(parents=True, exist_ok=True)
    migration = read(out.with_name(f"{out.stem}_data"))
    out.write_text(migration.yaml(), encoding="utf-8")
    print(escaped("\n".join(migration.lines())))
    try:
        load(TrainConfig, out, {})
    except ConfigError as error:
        print(escaped("\n  ".join(["quartet train would refuse it so far:", *error.problems])))
    print(f"written to {out}; quartet train {out} --dry_run checks it")
    write(args.json, asdict(migration))
    return 0


def environment_test(args: argparse.Namespace) -> int:
    config = _load(args)
    from grpo.cli.commands.environment_test import check_environment
    from rewards.commands.printer import publish

    return publish(check_environment(args.environment, config), args)


# Errors whose message is written for the user, beside ValueError and OSError; anything else is a bug and keeps its
# traceback.
EXPECTED = {
    "grpo.learner.parallel": "RankFailed",
    "grpo.learner.update": "NonFiniteStep",
    "grpo.run.checkpoint": "CheckpointError",
    "grpo.run.memory_errors": "OutOfMemory",
    "policies.conversion.parity": "ParityFailed",
    "rewards.protocol": "RewardError",
    "rollout.faults": "RolloutError",
}


def expected_errors() -> tuple[type[Exception], ...]:
    """Returns the classes of EXPECTED that are loaded: no other one can have been raised, and loading one may fail."""
    loaded = {module: name for module, name in EXPECTED.items() if hasattr(sys.modules.get(module), name)}
    return ValueError, OSError, *(getattr(sys.modules[module], name) for module, name in loaded.items())

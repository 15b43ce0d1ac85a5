"""A command line of several commands: how they are declared, parsed and ended. `quartet`, `quartet-reward` and
`quartet-review` are three.

Modules that a command works with are imported inside its function, so that --help and a typo answer at once.
"""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rewards.config.json_file import write_json
from rewards.isolation.output import escaped
from rewards.protocol import RewardError

if TYPE_CHECKING:
    from pydantic import BaseModel

EXIT_ERROR, EXIT_USAGE = 1, 2
OURS = ("", "policies", "rollout", "rewards", "review", "grpo")

Argument = tuple[tuple[str, ...], dict[str, Any]]


class Command(NamedTuple):
    """A row of a table of commands: what `quartet NAME` is for, which function runs it, its arguments and options.

    `example` is a command line without the name. `about` describes a command that has no options class of its own.
    """

    help: str
    run: Callable[[argparse.Namespace], int | None] | None = None  # one without has other commands below it
    takes: Sequence[Argument] = ()
    options: type[BaseModel] | None = None
    example: str = ""
    about: str = ""

    def description(self, name: str) -> str:
        """The text under the usage. Options that belong to another command describe that one."""
        owner = getattr(self.options, "command", "")
        if self.options and owner.split()[-1:] == name.split()[-1:]:
            return self.options.__doc__ or self.help
        return self.about or f"{self.help[:1].upper()}{self.help[1:]}."


def argument(*names: str, **settings: object) -> Argument:
    """What a command takes besides its options, as the arguments of `add_argument`."""
    return names, settings


def json_argument(what: str) -> Argument:
    return argument("--json", type=Path, metavar="OUT", help=f"write {what} to this file")


def build_parser(
    parser: argparse.ArgumentParser,
    commands: Mapping[str, Command],
    words: Sequence[str] | None = None,
    sections: Mapping[str, Sequence[str]] | None = None,
) -> argparse.ArgumentParser:
    """Adds the commands, with the options of the one that `words` begin with; without words, with those of all.
    `args.command` is the function to call, `args.options` the class of the options. Help lists the commands by
    `sections`, if there are any."""
    from rewards.config.options import add_options

    begun = None if words is None else " ".join(word for word in words if not word.startswith("-"))
    groups = {"": _add_sections(parser, commands, sections) if sections else _add_group(parser)}
    for name, command in commands.items():
        group, _, last = name.rpartition(" ")
        options = command.options
        sub = groups[group].add_parser(last, help=command.help, description=command.description(name))
        if command.run is None:
            groups[name] = _add_group(sub)
            continue
        if command.example:
            sub.epilog = f"example: {sub.prog} {command.example}"
        for names, settings in command.takes:
            _add_argument(sub, names, settings)
        if options and (begun is None or f"{begun} ".startswith(f"{name} ")):
            add_options(sub, options)
        sub.set_defaults(command=command.run, options=options)
    if problem := unknown_command(parser.prog, words or (), commands):
        parser.error(problem)
    return parser


def _add_group(parser: argparse.ArgumentParser) -> argparse._SubParsersAction[argparse.ArgumentParser]:
    """Places for commands; without one of them the parser's help is printed."""
    parser.set_defaults(command=lambda _: parser.print_help())
    return parser.add_subparsers(title="commands", metavar="COMMAND")


def _add_sections(
    parser: argparse.ArgumentParser, commands: Mapping[str, Command], sections: Mapping[str, Sequence[str]]
) -> argparse._SubParsersAction[argparse.ArgumentParser]:
    """Places for commands that help lists section by section, which argparse cannot do."""
    parser.set_defaults(command=lambda _: parser.print_help())
    places = parser.add_subparsers(metavar="COMMAND", help=argparse.SUPPRESS)
    width = max(map(len, commands))
    lines = [parser.description or "", "", "commands:"]
    for section, names in sections.items():
        lines += [f"  {section}", *(f"    {name:{width}}  {commands[name].help}" for name in names)]
    lines += ["", f"{parser.prog} COMMAND --help explains a command and its most used options."]
    parser.usage = "%(prog)s [-h] [--version] COMMAND ..."
    parser.description = "\n".join(lines)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    return places


def _add_argument(parser: argparse.ArgumentParser, names: Sequence[str], settings: Mapping[str, Any]) -> None:
    """`--dry-run` is read as `--dry_run`; help shows one spelling."""
    action = parser.add_argument(*names, **settings)
    for name in names:
        if name.startswith("--"):
            parser._option_string_actions.setdefault(name.replace("_", "-"), action)


def unknown_command(program: str, words: Sequence[str], commands: Mapping[str, Command]) -> str | None:
    """The answer to a command that does not exist, with the nearest name; None if `words` begin with a command.

    >>> unknown_command("quartet", ["trian", "run.yaml"], {"train": Command("GRPO", print)})
    'trian: no such command; did you mean quartet train?'
    """
    if not words or words[0].startswith("-"):
        return None
    first = commands.get(words[0])
    has_more = first is not None and first.run is None and len(words) > 1 and not words[1].startswith("-")
    typed = " ".join(words[:2]) if has_more else words[0]
    if typed in commands:
        return None
    by_name = {name.rpartition(" ")[2]: name for name in commands} | {name: name for name in commands}
    near = difflib.get_close_matches(typed, by_name, n=1)
    way_out = f"did you mean {program} {by_name[near[0]]}?" if near else f"{program} --help lists all commands"
    return f"{typed}: no such command; {way_out}"


class EscapingFormatter(logging.Formatter):
    """Warnings as Python prints them by default, escaped: they may quote a reward or a checkpoint."""

    def format(self, record: logging.LogRecord) -> str:
        return escaped(super().format(record))


def prepare_output() -> None:
    """Opens standard input, output and error where they are closed: the next file would get their number, and what a
    library prints would be written into it. Warnings are escaped from now on."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it gets the lowest number that is free
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(EscapingFormatter())


def run(parser: argparse.ArgumentParser, commands: Mapping[str, Command], words: Sequence[str]) -> int:
    """Runs the command that `words` name. Returns the exit code."""
    from rewards.config.options import parse

    prepare_output()
    args = None
    try:
        args = parse(build_parser(parser, commands, words), words)
        check_output(args)
        return int(args.command(args) or 0)
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    except Exception as error:
        return failed(error, args)


def version_of(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "(run from its source, not installed)"


def failed(
    error: BaseException,
    args: argparse.Namespace | None,
    expected: tuple[type[Exception], ...] = (ValueError, OSError, RewardError),
) -> int:
    """Prints what has ended a command, and gives the exit code. Raises the error again where it is none of the
    `expected` ones, whose messages are written for the user: it is a bug and keeps its traceback."""
    from rewards.config.options import ConfigError

    if isinstance(error, ConfigError):
        return fail("\n  ".join(["the configuration is not usable:", *error.problems]), EXIT_USAGE)
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] not in OURS:
        what = f"the package {error.name!r} is not installed in this environment ({sys.executable})"
        return fail(f"{what}: install quartet there again, or the package alone", EXIT_ERROR)
    if not isinstance(error, expected):
        raise error
    return fail(f"{option_of(error, args)}{error}", EXIT_ERROR)


def option_of(error: BaseException, args: argparse.Namespace | None) -> str:
    """Returns `output_dir: ` for an error of the operating system about a file in the folder that this option names."""
    if not isinstance(error, OSError) or not isinstance(error.filename, str | Path):
        return ""  # one of our own messages, which name it themselves
    file = Path(error.filename).absolute()
    paths = {name: value for name, value in vars(args or argparse.Namespace()).items() if isinstance(value, Path)}
    paths |= {name: value for name, value in getattr(args, "overrides", {}).items() if isinstance(value, str | Path)}
    places = {name: Path(value).absolute() for name, value in paths.items() if str(value)}
    of_file = [name for name, path in places.items() if file == path or path in file.parents or file in path.parents]
    longest = max(of_file, key=lambda name: len(places[name].parts), default=None)
    return f"{longest}: " if longest else ""


def check_output(args: argparse.Namespace) -> None:
    """Makes the folder of --json and opens the file, which is left as it is: after hours of work it would be too late
    to find that it cannot be written. Raises OSError."""
    path: Path | None = getattr(args, "json", None)
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    path.open("a").close()
    if is_new:
        path.unlink()


def write(path: Path | None, content: dict[str, Any]) -> None:
    """Writes what a command has found to the file of --json, where there is one."""
    if path is not None:
        write_json(path, content)
        print(f"written to {path}")


def fail(message: str, code: int) -> int:
    print_error(message)
    return code


def print_error(message: str) -> None:
    """Prints every error: no other place does. Errors quote what others wrote: rewards, column names, checkpoints."""
    print(escaped(f"quartet: {message}"), file=sys.stderr)

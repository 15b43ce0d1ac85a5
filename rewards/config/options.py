"""From a pydantic model to a command line, a YAML file and a reference page.

A class of options is the one place where an option is named, typed, explained and given its default:

    class RolloutOptions(Options):
        group_size: int = Field(default=8, ge=2)
        \"\"\"Completions per prompt.\"\"\"

    class TrainOptions(Options):
        rollout: RolloutOptions = RolloutOptions()
        \"\"\"How completions are sampled.\"\"\"

    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=Path, nargs="?")
    add_options(parser, TrainOptions)
    args = parse(parser, ["--rollout.groupsize", "4"])
    load(TrainOptions, args.config, args.overrides, args.flags)
    # ConfigError: rollout.groupsize=4 (command line): no such option; did you mean rollout.group_size?
"""

import argparse
import copy
import inspect
import itertools
import json
import logging
import re
import sys
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, cast, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, PydanticUndefined, core_schema

from rewards.config import names
from rewards.config.json_file import unfit
from rewards.config.problems import Source, describe, in_python, unknown_option
from rewards.config.yaml_file import ConfigError, Place, parse_yaml, read_yaml, to_yaml

__all__ = ["ConfigError", "Options", "add_options", "dump_yaml", "load", "parse", "reference_page"]

LOGGER = logging.getLogger(__name__)
COMMANDS: dict[str, type[BaseModel]] = {}  # the options of each command that is imported, by its name
Model = TypeVar("Model", bound=BaseModel)

_SIGNS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤", "min_length": "length ≥", "max_length": "length ≤"}


class Lines:
    """Marks an option that takes a text of several lines. On the command line `\\n` is a line break, and `\\\\n` is
    none; a file writes a line break as YAML does."""

    @staticmethod
    def read(text: str) -> str:
        return re.sub(r"(?<!\\)\\n", "\n", text).replace(r"\\n", r"\n")


class OneOrMore:
    """Marks a list of options that may be given as they are if the list has one item: `data: {name: gsm8k}` and, on the
    command line, `--data.name gsm8k`. A configuration that we write has that form, too."""

    @classmethod
    def __get_pydantic_core_schema__(cls, annotation: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        as_written = core_schema.wrap_serializer_function_ser_schema(cls.shorten)
        return core_schema.no_info_before_validator_function(cls.listed, handler(annotation), serialization=as_written)

    @staticmethod
    def listed(value: object) -> list[object]:
        """A list of the options. Python may give them as objects, also of a class with fewer options."""
        items = value if isinstance(value, list) else [value]
        return [
            {name: getattr(item, name) for name in item.model_fields_set} if isinstance(item, BaseModel) else item
            for item in items
        ]

    @staticmethod
    def shorten(items: object, dump: Callable[[Any], Any]) -> object:
        dumped = dump(items)
        return dumped[0] if len(dumped) == 1 else dumped


class Options(BaseModel):
    """Base of every class of options: unknown keys are refused, the string under a field is its help."""

    model_config = ConfigDict(
        extra="forbid",
        validate_default=True,
        validate_assignment=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        defer_build=True,  # a command has options of its own alone, and must say something within a second
    )

    def __init__(self, **options: object) -> None:
        """Raises ConfigError with what the command line says of such options. Files and parts of other options are
        validated without it."""
        if command := getattr(type(self), "command", ""):
            options = names.renew(command, options, warn_of_old_name)
        try:
            super().__init__(**options)
        except ValidationError as error:
            source = Source(None, {}, {}, list(_defaults(type(self))), [], command, _elsewhere(command))
            raise ConfigError(map(in_python, source.explain(error.errors(), options))) from None

    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def __pydantic_init_subclass__(cls, **_: object) -> None:
        """What is a command's has its name, and commands know of each other's options."""
        if command := cls.__dict__.get("command"):
            COMMANDS[command] = cls


class _Option(NamedTuple):
    key: str  # rollout.group_size; inside a list rewards[].function
    field: FieldInfo
    default: object  # PydanticUndefined where a value is required
    model: type[BaseModel] | None = None  # whose options come below this one
    in_list: bool = False  # below each item of this one

    @property
    def is_group(self) -> bool:  # always there: only the options below it can be given
        return self.model is not None and (self.field.annotation is self.model or OneOrMore in self.field.metadata)

    @property
    def help(self) -> str:
        return " ".join((self.field.description or "").split())

    @property
    def shown_type(self) -> str:  # `int ≥ 2`, `grpo|dapo`, `list[int]`
        limits = [
            f"{sign} {getattr(limit, name)}"
            for limit in self.field.metadata
            for name, sign in _SIGNS.items()
            if getattr(limit, name, None) is not None
        ]
        return " ".join([_type_name(self.field.annotation), *limits])

    @property
    def shown_default(self) -> str:
        if isinstance(self.default, str) and "\n" in self.default:
            return json.dumps(self.default)  # YAML would break the line
        return "" if self.default is PydanticUndefined else to_yaml(self.default, inline=True)


def _members(annotation: object) -> list[Any]:
    return list(get_args(annotation)) if get_origin(annotation) in (Union, types.UnionType) else [annotation]


def _type_name(annotation: object) -> str:
    if get_origin(annotation) is Annotated:
        return get_args(annotation)[-1]  # which says what it looks like
    if get_origin(annotation) is Literal:
        return "|".join(map(str, get_args(annotation)))
    if len(members := _members(annotation)) > 1:
        return "|".join(map(_type_name, members))
    if origin := get_origin(annotation):
        return f"{origin.__name__}[{', '.join(map(_type_name, get_args(annotation)))}]"
    if annotation is type(None) or annotation is ...:
        return "null" if annotation is type(None) else "..."
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return "mapping"
    return getattr(annotation, "__name__", str(annotation))


def _options(defaults: BaseModel, prefix: str = "") -> Iterator[_Option]:
    """Every option of a model, and below it those of the model inside `M`, `M | None` or `list[M]`."""
    for name, field in type(defaults).model_fields.items():
        default = getattr(defaults, name, PydanticUndefined)
        inner = [member for member in _members(field.annotation) if member is not type(None)]
        in_list = len(inner) == 1 and get_origin(inner[0]) is list
        model = get_args(inner[0])[0] if in_list else inner[0]
        if OneOrMore in field.metadata:
            in_list, default = False, cast(Any, default)[0]
        if len(inner) == 1 and inspect.isclass(model) and issubclass(model, BaseModel):
            yield _Option(prefix + name, field, default, model, in_list)
            below = default if isinstance(default, model) else model.model_construct()
            yield from _options(below, f"{prefix}{name}{'[]' if in_list else ''}.")
        else:
            yield _Option(prefix + name, field, default)


class _Override(argparse.Action):
    """Collects `--a.b VALUE` in `namespace.overrides`; the last one given wins."""

    def __call__(self, parser: object, namespace: argparse.Namespace, value: object, option: object = None) -> None:
        others = {key: other for key, other in namespace.overrides.items() if key != self.dest}
        namespace.overrides = {**others, self.dest: value}


def _value(annotation: object, text: str, lines: bool = False) -> object:
    """A value from the command line: YAML, but an option that takes text gets it as it was written (see Lines).

    An option that takes a text or a list of texts gets a list if the words begin with `[`. One that takes a text or
    what the messages of a chat say gets a mapping if the words begin with `{system:` or `{user:`.
    """
    members = set(_members(annotation))
    if members == {str, list[str]} and not text.lstrip().startswith("["):
        return text
    begins_a_mapping = re.match(r"\s*\{\s*[\"']?(system|user)[\"']?\s*:\s", text)  # a format string begins with {, too
    if lines and type(None) not in members and not begins_a_mapping:
        members = {str}
    if members <= {str, Path, type(None)} and not (text == "null" and type(None) in members):
        return Lines.read(text) if lines else text
    try:
        return parse_yaml(text)
    except yaml.YAMLError:
        return text  # the model will say what it expects instead


class _Help(argparse.Action):
    """`--help` shows the options in `common`, all of them where there is no such choice; `--help all` shows all."""

    def __init__(self, option_strings: Sequence[str], dest: str, common: Collection[str]) -> None:
        what = "show the options that most runs use, or all of them" if common else "show this help"
        absent = argparse.SUPPRESS
        super().__init__(option_strings, absent, nargs="?", metavar="all", default=absent, help=what)
        self.common = common

    def __call__(self, parser: Any, namespace: argparse.Namespace, value: object, option: str | None = None) -> None:
        if value == "all" or not self.common:
            parser.print_help()
            parser.exit()
        formatter, left = parser._get_formatter(), 0
        formatter.add_usage(parser.usage, parser._actions, parser._mutually_exclusive_groups)
        formatter.add_text(parser.description)
        for group in parser._action_groups:
            shown = [a for a in group._group_actions if not isinstance(a, _Override) or a.dest in self.common]
            left += len(group._group_actions) - len(shown)
            if shown:
                formatter.start_section(group.title)
                formatter.add_arguments(shown)
                formatter.end_section()
        formatter.add_text(f"{left} more options: {parser.prog} --help all")
        formatter.add_text(parser.epilog)
        print(formatter.format_help(), end="")
        parser.exit()


def add_options(parser: argparse.ArgumentParser, model_cls: type[BaseModel]) -> None:
    """Adds one `--a.b.c VALUE` per option of the model, in one group per nested model.

    The model's `common`, if it has any, are the options that `--help` shows; `--help all` shows all.
    """
    parser.allow_abbrev = False
    parser._optionals.conflict_handler = "resolve"  # argparse's own --help gives way to ours
    parser.add_argument("-h", "--help", action=_Help, common=getattr(model_cls, "common", ()))
    parser.set_defaults(overrides={}, options_parser=parser)
    parser.usage = parser.usage or "%(prog)s [argument ...] [--option VALUE ...]"
    groups = {"": parser.add_argument_group("options of the configuration")}
    for option in _options(model_cls.model_construct()):
        key, text = option.key, option.help
        default = f"default: {option.shown_default}" if option.shown_default else "required"
        if "[]" in key:
            continue
        if option.model and option.in_list:
            text += f" Each item: {', '.join(option.model.model_fields)}."
        elif option.model:
            groups[key] = parser.add_argument_group(key, text if option.is_group else None)
        is_one_or_more = OneOrMore in option.field.metadata  # given as a whole, too
        if is_one_or_more or not option.is_group:
            groups.get(key, groups[key.rpartition(".")[0]]).add_argument(
                f"--{key}",
                action=_Override,
                type=partial(_value, option.field.annotation, lines=Lines in option.field.metadata),
                default=argparse.SUPPRESS,
                metavar=option.shown_type,
                help=(text if is_one_or_more else f"{text} ({default})").replace("%", "%%"),
            )


def _join(words: Iterable[str], takes_value: Callable[[str], Any]) -> list[str]:
    """Makes `--name VALUE` one word `--name=VALUE`, whatever VALUE looks like."""
    joined: list[str] = []
    for word in words:
        if joined and takes_value(joined[-1]) and not word.startswith("--"):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def _with_whole_keys(words: Sequence[str]) -> Iterator[str]:
    """Writes `--data VALUE` as `--data.name VALUE`, except for a list."""
    for word, after in itertools.zip_longest(words, words[1:], fillvalue=""):
        name, equals, value = word.partition("=")
        is_list = (value if equals else after).lstrip().startswith("[")
        yield word if name != "--data" or is_list else f"--data.name{equals}{value}"


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses a command line (of a subcommand, too) without losing a word of it.

    `overrides` maps dotted keys to values, also keys that the model lacks: `load` refuses them by name.
    `flags` are the parser's other options, for `load` to suggest. Raises ConfigError for a stray word.
    """
    words = _join(_with_whole_keys(sys.argv[1:] if argv is None else argv), re.compile(r"--\w+(\.[\w-]+)+").fullmatch)
    seen, unknown = parser.parse_known_args(words)
    words = _join(words, {word for word in unknown if "=" not in word}.__contains__)  # no value taken for a positional
    options = getattr(seen, "options_parser", parser)._option_string_actions
    # Keys inside a mapping: argparse takes a word that it does not know, with a space in it, for a positional.
    inside = {word for word in words if re.match(r"--\w+(\.[\w-]+)+=", word) and word.partition("=")[0] not in options}
    args, rest = parser.parse_known_args([word for word in words if word not in inside])
    rest += [word for word in words if word in inside]
    flags = {name: action for name, action in options.items() if name in action.option_strings}  # as help spells them
    args.flags = [name.lstrip("-") for name, action in flags.items() if not isinstance(action, _Override)]
    extra = {}
    for word in rest:
        name, _, text = word.partition("=")
        if not name.startswith("-"):
            raise ConfigError([f"{name}: this word follows no option; see --help all"])
        extra[name.lstrip("-")] = _value(Any, text)
    if extra and not hasattr(args, "overrides"):
        raise ConfigError(unknown_option(key, extra[key], "command line", args.flags) for key in extra)
    args.overrides = getattr(args, "overrides", {}) | extra
    return args


def _set(data: dict[str, Any], key: str, value: object) -> None:
    """`_set(data, "a.b", 1)` makes `data["a"]["b"]` 1; raises ConfigError where `a` is no mapping."""
    *parents, last = key.split(".")
    for depth, part in enumerate(parents, start=1):
        if data.get(part) is None:
            data[part] = {}
        data = data[part]
        if not isinstance(data, dict):
            whole = ".".join(parents[:depth])
            what = f"cannot be set inside {whole}={to_yaml(data, inline=True)}; give {whole} as a whole"
            if isinstance(data, list):
                what = f"{whole} is a list of {len(data)}; change it in the file, or give all of it: --{whole} '[...]'"
            raise ConfigError([describe(key, value, "command line", what)])
    data[last] = copy.deepcopy(value)


def _fill(defaults: BaseModel, options: dict[str, Any]) -> dict[str, Any]:
    """`given` over what `defaults` was built with, so that a partial mapping keeps the rest of a default."""
    filled = {name: getattr(defaults, name) for name in defaults.model_fields_set} | options
    for name in type(defaults).model_fields:
        default, below = getattr(defaults, name, None), options.get(name, {})
        if isinstance(default, BaseModel) and isinstance(below, dict):
            filled[name] = _fill(default, below)
    return filled


@cache
def _defaults(model_cls: type[BaseModel]) -> dict[str, Any]:
    """The defaults of all options of a model, by their keys."""
    return {option.key: option.default for option in _options(model_cls.model_construct())}


def _elsewhere(command: str) -> dict[str, Any]:
    """The options of all commands that are imported, with their defaults; none for what is no command's."""
    return {key: default for cls in COMMANDS.values() for key, default in _defaults(cls).items()} if command else {}


def load(
    model_cls: type[Model],
    config_file: Path | None,
    overrides: Mapping[str, Any],
    flags: Iterable[str] = (),
    *,
    on_removed: Callable[[str], None] | None = None,
) -> Model:
    """The defaults, then the file, then the overrides (`{"rollout.group_size": 8}`), validated.

    `overrides` and `flags` come from `parse`. Raises ConfigError with all problems at once, one line each:
    `rollout.group_size=1 (demo.yaml, line 3): expected greater than or equal to 2`. `on_removed` is for what 0.2
    wrote: an option that is no longer there is left out, and a sentence about it goes to this function. Old
    names work, see names.py; without `on_removed` a warning says so.
    """
    data: dict[str, Any] = {}
    lines: dict[Place, int] = {}
    problems: list[str] = []
    if config_file is not None:
        try:
            data, lines = read_yaml(config_file)
        except ConfigError as error:
            problems += error.problems
    unread = bool(problems)
    command = getattr(model_cls, "command", "")
    tell = None if on_removed else warn_of_old_name
    data = names.renew(command, data, tell)
    # An old name stays in its place, too: where both names are given it is refused by its own line.
    lines = {names.new_place(place): line for place, line in lines.items()} | lines
    overrides = names.renew_keys(command, overrides, tell)
    for key, value in overrides.items():
        if fault := unfit(value):  # bytes on the command line that are no text
            problems.append(describe(key, {}, "command line", fault))
            continue
        try:
            _set(data, key, value)
        except ConfigError as error:
            problems += error.problems
    names.settle_data(command, data, tell)
    defaults = model_cls.model_construct()
    options = {option.key: option for option in _options(defaults)}
    leaves = {key for key, option in options.items() if option.model is None or option.in_list}
    leaves |= {key for key, value in data.items() if isinstance(value, list)}
    names.drop_unused(data, leaves, _elsewhere(command), on_removed)
    data = _fill(defaults, data)
    try:
        model = model_cls.model_validate(data, context={"checked_only": bool(problems)})
    except ValidationError as error:
        errors = [item for item in error.errors() if not (unread and item["type"] == "missing")]
        source = Source(config_file, lines, overrides, list(options), list(flags), command, _elsewhere(command))
        problems = source.explain(errors, data) + problems
    if problems:
        raise ConfigError(problems)
    return model


def warn_of_old_name(old: str, new: str) -> None:
    """Tells a user who has written a name of 0.2."""
    LOGGER.warning("%s is %s now; the old name works until %s", old, new, names.WORKS_UNTIL)


def dump_yaml(model: BaseModel) -> str:
    """The effective configuration; `load` of it gives an equal model."""
    return to_yaml(model.model_dump(round_trip=True))


def reference_page(model_cls: type[BaseModel]) -> str:
    """A Markdown table of every option: its key, type, default and meaning."""
    rows = [("key", "type", "default", "meaning"), ("---", "---", "---", "---")]
    for option in _options(model_cls.model_construct()):
        default = f"`{option.shown_default}`" if option.shown_default else "required"
        default = "" if option.is_group else default
        rows.append((f"`{option.key}`", f"`{option.shown_type}`", default, option.help))
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |\n" for row in rows)

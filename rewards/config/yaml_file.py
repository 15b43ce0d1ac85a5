"""YAML for configurations: scalars without surprises, a line number for every key, one line per problem."""

import difflib
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from rewards.config.json_file import MOST_NESTED, unfit

MOST_BYTES, MOST_VALUES = 1_000_000, 100_000  # of a configuration; there are some hundred options
Place = tuple[str | int, ...]
"""The place of a value: `("rewards", 0, "function")`, shown as `rewards[0].function`."""


class ConfigError(ValueError):
    """Everything that is wrong with a configuration, one line per problem."""

    def __init__(self, problems: Iterable[str]):
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


class _Loader(yaml.SafeLoader):
    """Scalars as in YAML 1.2: 1e-3 is a number; on, no, 012, 12:30 and 2026-01-31 are text. No tags such as !!set."""


_TAGS = ("null", "bool", "int", "float", "str", "seq", "map")
_Loader.yaml_constructors = {
    tag: build
    for tag, build in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] in _TAGS
}


class _Dumper(yaml.SafeDumper):
    """Quotes whatever either version of YAML would not read back as text."""

    def ignore_aliases(self, data: object) -> bool:
        return True


_FLOAT = r"[-+]?(\.[0-9]+|(0|[1-9][0-9_]*)(\.[0-9_]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
_SCALARS = [
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
    ("merge", r"<<", ["<"]),
]
_Loader.yaml_implicit_resolvers = {}
for _class in (_Loader, _Dumper):
    for _tag, _pattern, _first in _SCALARS:
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def parse_yaml(text: str) -> Any:
    """Plain Python values; raises `yaml.YAMLError`. `parse_yaml("[1, 1e-3, no]")` is `[1, 0.001, "no"]`."""
    return _construct(text, {})


def _construct(text: str, lines: dict[Place, list[int]]) -> Any:
    """The value in `text`, and in `lines` the lines of every key. Raises `yaml.YAMLError`."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _note_lines(node, (), lines, iter(range(MOST_VALUES)))  # before merge keys (<<) are unfolded into the nodes
        value = loader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError(f"nested more than {MOST_NESTED} levels deep") from None
    except (ValueError, KeyError) as error:  # `!!int x`, `!!bool x`, a number of thousands of digits
        raise yaml.YAMLError(f"a value that is not of its type ({error})") from None
    if fault := unfit(value):
        raise yaml.YAMLError(fault)
    return value


def to_yaml(value: object, inline: bool = False) -> str:
    """Plain values (also models and paths) as YAML that `parse_yaml` reads back, on one line if `inline`."""
    from pydantic_core import to_jsonable_python  # an image without it reads YAML all the same

    text = yaml.dump(
        to_jsonable_python(value, fallback=str),
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=inline,
        width=sys.maxsize if inline else 110,
    )
    return text.removesuffix("...\n").strip() if inline else text


def show_place(place: Place) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")


def _note_lines(node: yaml.Node, place: Place, lines: dict[Place, list[int]], left: Iterator[int]) -> None:
    """Note the lines of every key: more than one if it is repeated.

    An alias (`*name`) is followed. Raises `yaml.YAMLError` where aliases make a value of itself, or a small text a
    giant: the values count here as often as they would be read.
    """
    if len(place) > MOST_NESTED:
        raise yaml.YAMLError(f"nested more than {MOST_NESTED} levels deep, or an alias that contains itself")
    if next(left, None) is None:
        raise yaml.YAMLError(f"more than {MOST_VALUES:,} values; aliases inside each other multiply them")
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*place, str(key.value) if isinstance(key, yaml.ScalarNode) else "?")
            lines.setdefault(here, []).append(key.start_mark.line + 1)
            _note_lines(value, here, lines, left)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[*place, index] = [value.start_mark.line + 1]
            _note_lines(value, (*place, index), lines, left)


def _missing(path: Path) -> str:
    if not path.parent.is_dir():
        return f"{path}: no such file; there is no folder {path.parent}"
    others = sorted(file.name for file in path.parent.iterdir() if file.suffix in (".yaml", ".yml"))
    nearest = difflib.get_close_matches(path.name, others, n=1, cutoff=0.0)
    hint = f"did you mean {path.parent / nearest[0]}?" if nearest else f"{path.parent} holds no .yaml file"
    return f"{path}: no such file; {hint}"


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[Place, int]]:
    """The mapping in a file and the line of each of its keys.

    Raises ConfigError where there is no such file, no mapping in it, or a key is there twice.
    """
    if not path.is_file():
        raise ConfigError([_missing(path)])
    if (size := path.stat().st_size) > MOST_BYTES:
        raise ConfigError([f"{path}: is {size:,} bytes long; a configuration has some thousand"])
    lines: dict[Place, list[int]] = {}
    try:
        data = _construct(path.read_text(encoding="utf-8"), lines)
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: is not UTF-8 text (byte {error.start})"]) from None
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError([f"{path}{line}: is not valid YAML: {error.problem}"]) from None
    except yaml.YAMLError as error:
        raise ConfigError([f"{path}: is not valid YAML: {error}"]) from None
    if data is None:
        raise ConfigError([f"{path}: is empty; write options such as `steps: 10`, or name no file"])
    if not isinstance(data, dict):
        raise ConfigError([f"{path}: expected a mapping such as `steps: 10`, got {to_yaml(data, inline=True)}"])
    repeated = [(place, numbers) for place, numbers in lines.items() if len(numbers) > 1]
    if repeated:
        raise ConfigError(
            f"{path}: {show_place(place)} is given on lines {' and '.join(map(str, numbers))}; keep one"
            for place, numbers in repeated
        )
    return data, {place: numbers[0] for place, numbers in lines.items()}


def changed_options(saved: Path, now: str) -> dict[str, tuple[Any, Any]]:
    """Tells what a run's config.yaml and a YAML text differ in. Raises ConfigError naming a file that is damaged."""
    return differences(read_yaml(saved)[0], parse_yaml(now))


def differences(before: object, now: object) -> dict[str, tuple[Any, Any]]:
    """Tells what two trees of options differ in, by dotted key.

    >>> differences({"steps": 3, "lora": {"rank": 4}}, {"steps": 5, "lora": {"rank": 4}})
    {'steps': (3, 5)}
    """
    former, present = flat(before), flat(now)
    return {
        key: (former.get(key), present.get(key))
        for key in sorted(former.keys() | present.keys())
        if former.get(key) != present.get(key)
    }


def flat(tree: object, prefix: str = "") -> dict[str, Any]:
    """A tree of options by dotted key; lists are values.

    >>> flat({"steps": 3, "lora": {"rank": 4}})
    {'steps': 3, 'lora.rank': 4}
    """
    if not isinstance(tree, dict):
        return {prefix: tree}
    below = [flat(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in tree.items()]
    return {key: value for flat in below for key, value in flat.items()}

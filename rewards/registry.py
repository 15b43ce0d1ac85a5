"""Finds rewards: built-ins by name, and users' functions as `path/to/file.py:function` or `package.module:function`.

A word before that says in which tool's form it is written: `verl:path/to/file.py:compute_score` (see rewards.forms).
`chat:` before all of that passes prompts and completions as chat messages. `model:FOLDER_OR_NAME` is a reward model,
which a run loads itself (grpo/task/reward_models.py).
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.abc
import importlib.util
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from rewards.opened import opened_by
from rewards.protocol import Reward, RewardError, did_you_mean

_MODULES = {
    "gsm8k": ("gsm8k", "gsm8k_flexible", "gsm8k_boxed", "gsm8k_lm_eval"),
    "equivalence": ("math_equivalence",),
    "format": ("regex_format", "tag_format", "gsm8k_format"),
    "length": ("length_penalty", "repetition_penalty", "soft_overlong_punishment"),
    "remote": ("remote",),
    "judge": ("judge",),
    "code": ("code",),
    "column": ("column", "environment", "agent"),
    "reasoning": ("reasoning_gym",),
}
BUILT_IN = {name: f"rewards.built_in.{module}" for module, names in _MODULES.items() for name in names}
BUILT_IN |= {name: f"rewards.forms.{name}" for name in ("nemo_gym", "openenv")}  # servers of other tools
FORMS = ("verl", "verifiers")  # of other tools
CHAT, MODEL = "chat:", "model:"
OF_VERL = ("data_source", "ground_truth", "answer", "reward_model", "extra_info")  # columns; others are options
CALLABLES: dict[str, Reward] = {}  # functions of this process that were handed over from Python


@dataclass(frozen=True)
class Source:
    """A reward by name and, if it is a user's, its file as it was when first read."""

    function: str
    attribute: str
    path: str | None = None
    content: bytes = b""

    @property
    def sha256(self) -> str | None:
        return hashlib.sha256(self.content).hexdigest() if self.path else None

    @property
    def code_sha256(self) -> str | None:
        """SHA-256 of the function and what it reaches in its file, see `rewards.reached_code`."""
        from rewards.reached_code import code_sha256

        return code_sha256(self.content, self.attribute) if self.path else None

    @property
    def form(self) -> str:
        """The tool in whose form the function is written; empty for TRL's form, which is ours."""
        return _split(self.function)[0]

    def may_read(self, column: str) -> bool:
        """Tells whether a column of the name of an optional parameter goes to it. Options of a built-in and of verl's
        functions are bound alone."""
        return bool(self.path) and (self.form != "verl" or column in OF_VERL)


def _split(function: str) -> tuple[str, str, str]:
    """The form, the file or module, and the name in it.

    >>> _split("verl:my_rewards.py:compute_score"), _split("chat:my_rewards.py:exact")
    (('verl', 'my_rewards.py', 'compute_score'), ('', 'my_rewards.py', 'exact'))
    """
    function = function.removeprefix(CHAT)
    form, _, rest = function.partition(":")
    place, _, attribute = (rest if form in FORMS else function).rpartition(":")
    return (form if form in FORMS else ""), place, attribute


def find_reward(function: str) -> Source:
    """Read what `function` names, without running it. Raises RewardError with the nearest valid name."""
    if function.startswith(MODEL):
        raise RewardError(
            f"reward {function!r} is a model, which a run or quartet eval loads; nothing else scores with it"
        )
    form, place, attribute = _split(function)
    if not place and not form:
        if function not in BUILT_IN:
            raise RewardError(
                f"reward {function!r} is not built in{did_you_mean(function, BUILT_IN)}. "
                f"Built in: {', '.join(BUILT_IN)}. Name your own as path/to/file.py:function{_of_hub(function)}"
            )
        return Source(function, function)
    if place == "python":
        if function not in CALLABLES:
            raise RewardError(f"reward {function!r} was a function of a script; run it there: train(..., reward=...)")
        return Source(function, attribute)
    return find_function(function, "reward")


def find_function(function: str, what: str) -> Source:
    """Read the file that `path/to/file.py:function` or `package.module:function` names, without running it; `what` is
    for errors. RewardError."""
    _, place, attribute = _split(function)
    path = Path(place).expanduser().resolve()
    if path.suffix != ".py" and (origin := _file_of(place)):
        path = origin
    if path.suffix != ".py" or not path.is_file():
        way_on = _of_hub(place) if place else "; name it as path/to/file.py:function"
        raise RewardError(f"{what} {function!r}: {path} is not an existing Python file{way_on}")
    return Source(function, attribute, str(path), path.read_bytes())


def _file_of(module: str) -> Path | None:
    """The file of a module that can be imported, found without importing it or a package that it is in."""
    names = module.split(".")
    if not all(map(str.isidentifier, names)):
        return None
    spec = importlib.util.find_spec(names[0])
    for end in range(2, len(names) + 1):
        if spec is None or spec.submodule_search_locations is None:
            return None
        spec = PathFinder.find_spec(".".join(names[:end]), spec.submodule_search_locations)
    return Path(spec.origin) if spec and spec.origin else None


def _of_hub(name: str) -> str:
    """Gives what a hub id can be here; empty for another name."""
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) or name.endswith(".py"):
        return ""
    return (
        f". If {name} is a hub id: functions are not taken from the hub, since code of its repositories is never run; "
        f"a reward model is: function: {MODEL}{name}"
    )


def load_reward(function: str | Source) -> Reward:
    """The function that `function` names: `"gsm8k"` or `"path/to/file.py:function"`, in TRL's form.

    A user's file runs as a module of its own, with its folder on `sys.path` as if it had been started there.

    >>> load_reward("gsm8k")(prompts=["6 * 7 = ?"], completions=["#### 42"], answer=["#### 42"])
    [1.0]
    """
    source = find_reward(function) if isinstance(function, str) else function
    if source.function in CALLABLES:
        return CALLABLES[source.function]
    module = _module_of(source) if source.path else importlib.import_module(BUILT_IN[source.function])
    if source.form and hasattr(module, source.attribute):
        return importlib.import_module(f"rewards.forms.{source.form}").reward_of(getattr(module, source.attribute))
    return _attribute_of(module, source, "reward")


def load_function(function: str | Source, what: str) -> Callable[..., Any]:
    """The function that `path/to/file.py:function` names; `what` is the option that errors name. Raises RewardError."""
    source = find_function(function, what) if isinstance(function, str) else function
    with opened_by(source.function):
        module = _module_of(source)
    return _attribute_of(module, source, what)


def load_class(name: str, what: str) -> type:
    """The class that `path/to/file.py:Class` or `package.module:Class` names, or that the function of
    `package.module:function("argument")` makes; `what` is the option that errors name. Raises RewardError."""
    factory = re.fullmatch(r'([\w.]+):(\w+)\((".*)\)', name)
    if factory:
        return getattr(importlib.import_module(factory[1]), factory[2])(*json.loads(f"[{factory[3]}]"))
    where, _, attribute = name.rpartition(":")
    is_file = where.endswith(".py")
    with opened_by(name):
        module = _module_of(find_function(name, what)) if is_file else importlib.import_module(where)
    value = getattr(module, attribute, None)
    if not isinstance(value, type):
        names = [n for n, v in vars(module).items() if isinstance(v, type) and v.__module__ == module.__name__]
        raise RewardError(
            f"{what} {name!r}: {where} has no class {attribute!r}{did_you_mean(attribute, names)}. It defines: "
            f"{', '.join(names) or 'no class'}"
        )
    return value


def name_callable(reward: Reward) -> str:
    """A name for a function of this process, by which a run can ask for it: `python:short`. It cannot be isolated."""
    name = f"python:{getattr(reward, '__name__', type(reward).__name__)}"
    CALLABLES[name] = reward
    return name


def _attribute_of(module: ModuleType, source: Source, what: str) -> Callable[..., Any]:
    def is_function(value: object) -> bool:
        return callable(value) and not isinstance(value, type)

    function: Any = getattr(module, source.attribute, None)
    if not is_function(function):
        defined = {n: v for n, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__}
        names = [name for name, value in defined.items() if is_function(value)]
        fault = "is no function" if hasattr(module, source.attribute) else "is not there"
        raise RewardError(
            f"{what} {source.function!r}: {source.attribute!r} {fault}{did_you_mean(source.attribute, names)}. "
            f"{source.path} defines: {', '.join(names) or 'no function'}"
        )
    return function


class _ReadOnce(importlib.abc.SourceLoader):
    """Runs the bytes that were hashed, even if the file has changed since."""

    def __init__(self, path: str, content: bytes):
        self.path, self.content = path, content

    def get_filename(self, fullname: str) -> str:
        return self.path

    def get_data(self, path: str) -> bytes:
        return self.content


def _module_of(source: Source) -> ModuleType:
    assert source.path is not None
    place = _split(source.function)[1]
    if not place.endswith(".py"):
        return importlib.import_module(place)
    folder, stem = str(Path(source.path).parent), Path(source.path).stem
    digest = hashlib.sha256(source.path.encode()).hexdigest()[:8]
    name = f"reward_{stem}_{digest}_{str(source.sha256)[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(name, source.path, loader=_ReadOnce(source.path, source.content))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module

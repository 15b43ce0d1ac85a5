"""Names of options that are none here: those that 0.2 had (older.yaml), so that its runs resume, and those of TRL,
transformers' Trainer, verl and unsloth (trainers.yaml), for a suggestion."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Set
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from rewards.config.yaml_file import Place, parse_yaml, read_yaml, to_yaml

ABSENT: object = object()
WORKS_UNTIL = "0.4"  # a name of 0.2
ANSWERING = ("eval", "sample", "serve", "quantize")  # the commands that do not learn
FOLDER = Path(__file__).parent


@cache
def _older() -> dict[str, dict[str, Any]]:
    return parse_yaml((FOLDER / "older.yaml").read_text(encoding="utf-8"))


@cache
def _removed() -> dict[str, tuple[str, Any]]:
    """The options of 0.2 that are gone: why, and the default that they had."""
    return {key: (why, default) for why, options in _older()["removed"].items() for key, default in options.items()}


def new_key(key: str) -> str:
    """The name of today for an option of 0.2, which may be in a section with another name; any other key as it is.

    >>> new_key("warm_start.steps"), new_key("steps")
    ('sft.steps', 'steps')
    """
    for old, new in _older()["renamed"].items():
        if key == old or key.startswith(f"{old}."):
            return f"{new}{key[len(old) :]}"
    return key


def renamed(key: str) -> str | None:
    """The question for an option of 0.2 that has another name now; None for any other key."""
    new = new_key(key)
    return None if new == key else f"did you mean {new}?"


def removed(key: str) -> str | None:
    """Return why an option of 0.2 is gone, or None for any other key."""
    return f"it is gone, since {_removed()[key][0]}" if key in _removed() else None


def default_then(key: str) -> object:
    """The default of an option that is gone; ABSENT for any other key."""
    return _removed()[key][1] if key in _removed() else ABSENT


def drop_unused(
    options: dict[str, Any], known: Set[str], elsewhere: Mapping[str, Any], tell: Callable[[str], None] | None = None
) -> None:
    """Takes out what the command, which has the `known` options, would not use: options that other commands have, with
    their defaults `elsewhere`, or that are gone. With `tell` it takes out those with other values, too, since a run of
    0.2 has recorded them; `tell` is called with each option that is gone."""
    for name, items in options.items():
        for item in items if isinstance(items, list) else ():
            for last in list(item) if isinstance(item, dict) else ():
                key = f"data.{last}" if name == "data" else f"{name}[].{last}"
                then = default_then(key)
                if not removed(key) or not (tell or item[last] == then):
                    continue
                value = item.pop(last)
                if tell and value != then:
                    tell(f"{key}={to_yaml(value, inline=True)}: {removed(key)}")
    for key, value in list(leaves(options)):
        names = key.split(".")
        if known & {".".join(names[: depth + 1]) for depth in range(len(names))}:
            continue
        then = default_then(key) if removed(key) else elsewhere.get(key, ABSENT)
        same = then is not ABSENT and (value == then or plain(value) == plain(then))
        if same or (tell and then is not ABSENT):
            take_option(options, key)
            if tell and not same and (why := removed(key)):
                tell(f"{key}={to_yaml(value, inline=True)}: {why}")


def renew(command: str, former: Mapping[str, Any], tell: Callable[[str, str], None] | None = None) -> dict[str, Any]:
    """Gives options of `quartet COMMAND`, by section, today's form. `tell` gets each name of 0.2 and today's."""
    options: dict[str, Any] = _copy(former)
    _rename(options, tell)
    if command and "data" in options:
        options["data"] = renew_data(options["data"], tell)
    url, teacher = take_option(options, "distill.url"), get(options, "distill.teacher")
    if isinstance(url, str) and teacher:
        put(options, "distill.teacher", f"{teacher}@{url}")
    _renew_rewards(options, tell or (lambda old, new: None))
    settle_data(command, options)
    return options


def _rename(options: dict[str, Any], tell: Callable[[str, str], None] | None) -> None:
    """Give options their new names. Options with both names keep both: the old one is then refused."""
    for old, new in _older()["renamed"].items():
        if get(options, old, ABSENT) is ABSENT or get(options, new, ABSENT) is not ABSENT:
            continue
        put(options, new, take_option(options, old))
        if tell:
            tell(old, new)


def _renew_rewards(options: dict[str, Any], tell: Callable[[str, str], None]) -> None:
    """A reward model is a reward; `chat:` before the name of a function was an option of its own."""
    rewards = options.get("rewards")
    if isinstance(rewards, str) and "reward_models" in options:
        rewards = options["rewards"] = [{"function": rewards}]
    for reward in rewards if isinstance(rewards, list) else ():
        if isinstance(reward, dict) and reward.get("chat") is True and ":" in reward.get("function", ""):
            del reward["chat"]
            reward["function"] = f"chat:{reward['function']}"
            tell("rewards[].chat: true", f"rewards[].function: {reward['function']}")
    models = options.get("reward_models")
    if not isinstance(models, list) or not isinstance(rewards, list):
        return
    for model in models:
        if not isinstance(model, dict) or not {"name", "model"} <= model.keys():
            return  # a message about the option follows
    for model in take_option(options, "reward_models"):
        if model.get("chat") is True:
            model["kind"] = "chat_classifier"
        arguments = {name: model[name] for name in ("kind", "label") if model.get(name) is not None}
        made = {"function": f"model:{model['model']}", "name": model["name"], "arguments": arguments}
        reader = {"function": "column", "arguments": {"name": model["name"]}}
        for reward in rewards:
            if isinstance(reward, dict) and reader.items() <= reward.items():
                reward.update(made)
                break
        else:
            rewards.append(made | {"weight": 0.0})  # a function reads its column
        tell("reward_models", f"rewards[].function: {made['function']}")


def renew_data(data: object, tell: Callable[[str, str], None] | None = None) -> Any:
    """Gives sources of data as a list, or as a mapping if there is one, under today's names.

    >>> renew_data({"template": "chat", "sources": ["gsm8k", {"name": "my.jsonl", "template": "{question}"}]})
    [{'template': 'chat', 'name': 'gsm8k'}, {'template': '{question}', 'name': 'my.jsonl'}]
    """
    shared: dict[str, Any] = {}
    if isinstance(data, dict) and "sources" in data:  # version 0.2: what a source did not say was as `data` said
        shared = {name: value for name, value in data.items() if name not in ("name", "sources")}
        if data["sources"] and tell:
            tell("data.sources", "data, a list: [{name: gsm8k, weight: 2}, {name: my.jsonl}]")
        data = data["sources"] or {name: value for name, value in data.items() if name != "sources"}
    sources = []
    for item in data if isinstance(data, list) else [data]:
        source = {"name": item} if isinstance(item, str) else item
        sources.append(_renew_source(shared | source, tell) if isinstance(source, dict) else source)
    return sources[0] if len(sources) == 1 else sources


def _renew_source(source: dict[str, Any], tell: Callable[[str, str], None] | None) -> dict[str, Any]:
    levels = source.pop("levels", None)
    if levels is not None and source.get("name", "word_problems") == "word_problems":  # others did not read them
        if levels != [1, 2] or source.get("task_options"):
            source["task_options"] = source.get("task_options", {}) | {"levels": levels}
        if tell:
            tell("data.levels", "data.task_options: {levels: [1, 2]}")
    messages = {"system": source.get("system_prompt"), "user": source.get("user_turn")}
    if source.get("template") == "chat" and any(messages.values()):
        source = {name: value for name, value in source.items() if name not in ("system_prompt", "user_turn")}
        source["template"] = {role: content for role, content in messages.items() if content}
        if tell:
            tell("data.system_prompt or data.user_turn", "data.template: {system: ..., user: ...}")
    return {name: value for name, value in source.items() if value != default_then(f"data.{name}")}


def sources_of(options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The sources of data of options that were recorded."""
    data = options.get("data", {})
    return data if isinstance(data, list) else [data]


def settle_data(command: str, options: dict[str, Any], tell: Callable[[str, str], None] | None = None) -> None:
    """Reads together what a file and a command line may each have a part of: the options of data.

    `rollout.compile: auto` of 0.2 compiled nothing in a command that does not learn."""
    if command and "data" in options:
        options["data"] = renew_data(options["data"], tell)
    if command in ANSWERING and get(options, "rollout.compile") == "auto":
        take_option(options, "rollout.compile")


def renew_keys(
    command: str, overrides: Mapping[str, Any], tell: Callable[[str, str], None] | None = None
) -> dict[str, Any]:
    """Does the same to options by their whole key, as a command line gives them."""
    renewed = {}
    for key, value in overrides.items():
        new = new_key(key)
        if new in overrides:  # given under both names: the old one is refused
            new = key
        if new != key and tell:
            tell(key, new)
        is_short = command and key == "data" and isinstance(value, str)
        renewed["data.name" if is_short else new] = value
    return renewed


def new_place(place: Place) -> Place:
    """Tells where an option of a file is in today's form."""
    if place[:2] == ("data", "sources"):
        return ("data", *place[2:])
    old = ".".join(map(str, place))
    new = new_key(old)
    return place if new == old else tuple(new.split("."))


def recorded_options(file: Path) -> tuple[str, dict[str, Any]]:
    """Tells which command's run has written this config.yaml, and gives its options in today's form, without those
    that are gone."""
    options, _ = read_yaml(file)
    command = "train" if "loss" in options else "mtp" if get(options, "mtp.epochs") else "sft"
    renewed = renew(command, options)
    drop_unused(renewed, frozenset(), {}, tell=lambda text: None)
    return command, renewed


# ---- options by their whole key -------------------------------------------------------------------------------------


def leaves(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the options that are no sections, by their whole keys.

    >>> list(leaves({"rollout": {"group_size": 4}, "steps": 2}))
    [('rollout.group_size', 4), ('steps', 2)]
    """
    for name, value in options.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def get(options: object, key: str, default: object = None) -> Any:
    for name in key.split("."):
        if not isinstance(options, Mapping) or name not in options:
            return default
        options = options[name]
    return options


def take_option(options: dict[str, Any], key: str) -> Any:
    """Takes an option out, and its section where that is empty then; ABSENT where it is not there."""
    *parents, last = key.split(".")
    section = get(options, ".".join(parents), ABSENT) if parents else options
    if not isinstance(section, dict) or last not in section:
        return ABSENT
    value = section.pop(last)
    if parents and not section:
        take_option(options, ".".join(parents))
    return value


def put(options: dict[str, Any], key: str, value: object) -> None:
    *parents, last = key.split(".")
    for name in parents:
        if not isinstance(options.get(name), dict):
            options[name] = {}
        options = options[name]
    merged = isinstance(value, dict) and isinstance(options.get(last), dict)
    options[last] = options[last] | value if merged else value


def plain(value: object) -> Any:
    """Gives the value as a YAML file holds it: a list for a tuple, a text for a path."""
    return parse_yaml(to_yaml(value))


def _copy(options: object) -> Any:
    if isinstance(options, list):
        return [_copy(item) for item in options]
    return {name: _copy(value) for name, value in options.items()} if isinstance(options, dict) else options


# ---- names of other trainers -----------------------------------------------------------------------------------------


Row = dict[str, Any]


@cache
def trainers() -> dict[str, dict[str, Row]]:
    """The rows of trainers.yaml by kind (`trl`, `trainer`, `lora`, `verl`, `others`) and whole name. `short` is the
    name without its section."""
    content = parse_yaml((FOLDER / "trainers.yaml").read_text(encoding="utf-8"))
    tables: dict[str, dict[str, Row]] = {}
    for kind, rows in content.items():
        tables[kind] = {}
        for section, group in rows.items() if kind == "verl" else [("", rows)]:
            for names, row in group.items():
                for name in names.split(", "):
                    tables[kind][f"{section}.{name}".lstrip(".")] = row | {"short": name}
    return tables


def ours(row: Row) -> list[str]:
    """Our options for another trainer's, the first one first; none where there is no such option here."""
    return (row.get("same") or row.get("to") or row.get("near") or "").split()


def rows_of(name: str) -> Iterator[Row]:
    """The rows for an option of another trainer. A longer end of its name goes before a shorter one, and a name before
    a pattern."""
    ends = [name.split(".", start)[start] for start in range(name.count(".") + 1)]
    rows = [row for table in trainers().values() for row in table.values()]
    for end in ends:
        yield from (row for row in rows if row["short"] == end)
    for end in ends:
        yield from (row for row in rows if "*" in row["short"] and fnmatchcase(end, row["short"]))


def hint(name: str, known: Collection[str]) -> str | None:
    """Tells what to say of `name`, an option of another trainer, to who gave it to a command with the `known` ones.

    None where the name is no other trainer's, or means something that this command does not have.

    >>> hint("num_generations", ["steps", "rollout.group_size"])
    'did you mean rollout.group_size?'
    >>> hint("top_p", [])[:22]
    'not supported, because'
    """
    section, dot, _ = name.partition(".")
    named = (trainers()["verl"].get(row.get("now", ""), row) for row in rows_of(name))
    row = next((row for row in named if ours(row) or "why" in row), {})
    if "why" in row:
        return f"not supported, because {row['why']}"
    option = next((key for target in ours(row) for key in _here(target, known)), None)
    if option and dot and name not in trainers()["verl"]:
        sibling = f"{section}.{option.rpartition('.')[2]}"
        option = sibling if sibling in known else option  # mtp.lr is mtp.learning_rate
    note = f" ({row['note']})" if "note" in row else ""
    return option and f"did you mean {option}?{note}"


def _here(target: str, known: Collection[str]) -> list[str]:
    """The options of this command that may be what `target`, an option of `quartet train`, is there; the best first."""
    if target.startswith("--"):
        return [target]
    last = target.rpartition(".")[2]
    return [key for key in (target, f"mtp.{last}", last) if key in known]

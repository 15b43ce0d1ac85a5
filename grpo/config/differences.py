"""What two configurations differ in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grpo.config.yaml_file import parse_yaml, read_yaml


def changed_options(saved: Path, now: str) -> dict[str, tuple[Any, Any]]:
    """What a run's config.yaml and a YAML text differ in. Raises ConfigError naming a file that is damaged."""
    return differences(read_yaml(saved)[0], parse_yaml(now))


def differences(before: Any, now: Any) -> dict[str, tuple[Any, Any]]:
    """What two trees of options differ in, by dotted key.

    >>> differences({"steps": 3, "lora": {"rank": 4}}, {"steps": 5, "lora": {"rank": 4}})
    {'steps': (3, 5)}
    """
    former, present = flat(before), flat(now)
    return {
        key: (former.get(key), present.get(key))
        for key in sorted(former.keys() | present.keys())
        if former.get(key) != present.get(key)
    }


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A tree of options by dotted key; lists are values.

    >>> flat({"steps": 3, "lora": {"rank": 4}})
    {'steps': 3, 'lora.rank': 4}
    """
    if not isinstance(tree, dict):
        return {prefix: tree}
    below = [flat(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in tree.items()]
    return {key: value for flat in below for key, value in flat.items()}

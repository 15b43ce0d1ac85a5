"""The commands of a shell script as the tree that shfmt prints (mvdan.cc/sh, `shfmt --to-json`). Nothing of it is run.

A node is a dict, and its `Type` says which: `CallExpr`, `IfClause`, `ParamExp` and so on. `Text`, the node as it is
written, is added here.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sysconfig
from functools import cache
from typing import Any

Node = dict[str, Any]


@cache
def parse(text: str) -> list[Node]:
    """The statements of a script. Raises ValueError with the line of what cannot be read."""
    content = text.encode(errors="replace")
    words = [_program(), "-ln", "bash", "--to-json"]
    done = subprocess.run(words, input=content, capture_output=True, check=False)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()
        line, why = re.findall(r"(\d+):\d+: (.*)|$", said)[0]
        raise ValueError(f"line {line} of the shell text cannot be read: {why or said}")
    script = json.loads(done.stdout)
    if comment := _joined_comment(script):
        end = comment["Hash"]["Offset"] + len(comment["Text"].encode()) - 1
        return parse((content[:end] + b" " + content[end + 1 :]).decode(errors="replace"))
    _note_texts(script, content)
    return script.get("Stmts", [])


def _program() -> str:
    path = shutil.which("shfmt", path=sysconfig.get_path("scripts")) or shutil.which("shfmt")
    if path is None:
        raise ValueError("shell scripts are read with shfmt, which is not installed; pip install 'quartet-rl[verl]'")
    return path


def _joined_comment(node: object) -> Node | None:
    """A comment that ends with a backslash: shfmt 4.2 joins the next line to its command, and bash does not."""
    if isinstance(node, dict) and "Hash" in node and node.get("Text", "").endswith("\\\n"):
        return node
    return next((found for each in _below(node) if (found := _joined_comment(each))), None)


def _below(node: object) -> list[object]:
    if isinstance(node, dict):
        return list(node.values())
    return node if isinstance(node, list) else []


def _note_texts(node: object, content: bytes) -> None:
    for each in _below(node):
        _note_texts(each, content)
    if isinstance(node, dict) and "Pos" in node and "End" in node:
        node["Text"] = content[node["Pos"]["Offset"] : node["End"]["Offset"]].decode(errors="replace")


def assigned_names(node: object) -> set[str]:
    """The variables that a script assigns anywhere."""
    names = {name for each in _below(node) for name in assigned_names(each)}
    if isinstance(node, dict) and ("Array" in node or "Value" in node) and isinstance(node.get("Name"), dict):
        names.add(node["Name"]["Value"])
    return names

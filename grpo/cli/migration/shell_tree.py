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
IN_ARRAY = "array element values must be words"


@cache
def parse(text: str) -> list[Node]:
    """The statements of a script. Raises ValueError with the line of what cannot be read."""
    content = text.encode(errors="replace")
    words = [_program(), "-ln", "bash", "--to-json"]
    while (done := subprocess.run(words, input=content, capture_output=True, check=False)).returncode:
        said = done.stderr.decode(errors="replace").strip()
        line, column, why = re.findall(r"(\d+):(\d+): (.*)|$", said)[0]
        at = sum(map(len, content.split(b"\n")[: int(line or 1) - 1])) + int(line or 1) + int(column or 1) - 2
        if why != IN_ARRAY or content[:at].endswith(b"\\"):
            raise ValueError(f"line {line} of the shell text cannot be read: {why or said}")
        content = content[:at] + b"\\" + content[at:]  # shfmt 4.2 reads `A=(x$i=1)` only with `\=`
    script = json.loads(done.stdout)
    if comment := _joined_comment(script):
        end = comment["Hash"]["Offset"] + len(comment["Text"].encode()) - 1
        return parse((content[:end] + b" " + content[end + 1 :]).decode(errors="replace"))
    _note_texts(script, content)
    return script.get("Stmts", [])


@cache
def arithmetic(text: str) -> Node | None:
    """The tree of a sum such as `A * (B + 1)`; None for an empty one."""
    return parse(f"(({text}))")[0]["Cmd"].get("X")


def _program() -> str:
    path = shutil.which("shfmt", path=sysconfig.get_path("scripts")) or shutil.which("shfmt")
    if path is None:
        raise ValueError("shell scripts are read with shfmt, which is not installed; pip install 'quartet-rl[verl]'")
    return path


def _joined_comment(node: object) -> Node | None:
    """A comment that ends with a backslash: shfmt 4.2 joins the next line to its command, and bash does not."""
    if isinstance(node, dict) and "Hash" in node and node.get("Text", "").endswith("\\\n"):
        return node
    below = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return next((found for each in below if (found := _joined_comment(each))), None)


def _note_texts(node: object, content: bytes) -> None:
    below = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    for each in list(below):
        _note_texts(each, content)
    if isinstance(node, dict) and "Pos" in node and "End" in node:
        node["Text"] = content[node["Pos"]["Offset"] : node["End"]["Offset"]].decode(errors="replace")

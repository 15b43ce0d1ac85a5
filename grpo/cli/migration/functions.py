"""Functions of a script by references that a run can import without running the script."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from grpo.cli.migration.migration import shown
from rewards.reached_code import is_guard, reached_source

TRAINS = {"GRPOTrainer", "train"}
LOADS = {"load_dataset", "from_pretrained", "parse_args", "parse_args_and_config", "parse_args_into_dataclasses"}
NAMED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
DEFINES = (*NAMED, ast.Import, ast.ImportFrom)


class Functions:
    """Gives references to functions that a script has handed to its trainer.

    A script that can be imported without work is referred to itself. Of another one the functions, with all that they
    reach in the script, are written into `functions.py` of `folder`.
    """

    def __init__(self, script: Path, folder: Path):
        self.script, self.file = script, folder / "functions.py"
        self.body = [part for part in ast.parse(script.read_bytes()).body if not is_guard(part)]
        self.can_be_imported = not any(_works(part) for part in self.body)
        self.copied: list[str] = []

    def reference(self, fact: dict[str, Any]) -> str | None:
        """`path.py:function` or `package.module:function` for what the recorder has found; None where nothing can
        import it."""
        if "name" not in fact:
            return None
        name = fact["name"]
        if fact["module"]:
            return f"{fact['module']}:{name}"
        if Path(fact["file"]) != self.script.resolve():
            return f"{shown(Path(fact['file']))}:{name}"
        if not any(name in _bound(part) for part in self.body):
            return None
        if self.can_be_imported:
            return f"{shown(self.script)}:{name}"
        self.copied.append(name)
        return f"{shown(self.file)}:{name}"

    def write(self) -> bool:
        """Writes the file of copied functions, and tells whether there are any."""
        if not self.copied:
            return False
        rest = ast.unparse(ast.Module([part for part in self.body if not _trains(part)], []))
        lines = (reached_source(rest.encode(), *self.copied) or rest).splitlines()
        first = [line for line in lines if line.startswith("from __future__")]
        title = f'"""Functions of {self.script.name}, with what they reach there."""'
        place = f"sys.path.insert(0, {str(self.script.resolve().parent)!r})"
        lines = [title, *first, "import sys", place, *(line for line in lines if line not in first)]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return True


def _bound(part: ast.stmt) -> set[str]:
    if isinstance(part, ast.Import | ast.ImportFrom):
        return {(alias.asname or alias.name).partition(".")[0] for alias in part.names}
    if isinstance(part, NAMED):
        return {part.name}
    return {node.id for node in ast.walk(part) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def _called(part: ast.stmt) -> set[str]:
    calls = [node.func for node in ast.walk(part) if isinstance(node, ast.Call)]
    return {call.attr if isinstance(call, ast.Attribute) else getattr(call, "id", "") for call in calls}


def _works(part: ast.stmt) -> bool:
    """Tells whether a statement of a file does more than to define something."""
    if isinstance(part, DEFINES):
        return False
    is_call = isinstance(part, ast.Expr) and not isinstance(part.value, ast.Constant)
    return is_call or bool(_called(part) & (TRAINS | LOADS))


def _trains(part: ast.stmt) -> bool:
    """Tells whether a statement trains, or calls a function of the script that may do so."""
    if isinstance(part, DEFINES):
        return False
    calls_by_name = isinstance(part, ast.Expr) and isinstance(getattr(part.value, "func", None), ast.Name)
    return calls_by_name or bool(_called(part) & TRAINS)

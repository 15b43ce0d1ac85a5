"""Which modules of the user a file imports, also inside of its functions, and what these import in turn."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from rewards.opened import is_installed


def imported_files(path: Path, source: str | bytes) -> list[Path]:
    """The files of the user's modules that `source`, the text of the file `path` or a part of it, needs.

    The code is read and not run, so a module counts that is imported late or under a condition. One whose name is only
    known when the code runs is not found.
    """
    importlib.invalidate_caches()  # a file may be newer than what importlib knows of its folder
    found: list[Path] = []
    waiting = [(path, source)]
    while waiting:
        file, text = waiting.pop()
        for module in _imports(file, text, path.parent):
            if module != path and module not in found and not is_installed(str(module)):
                found.append(module)
                waiting.append((module, module.read_bytes()))
    return found


def package_files(module: str) -> list[Path]:
    """The `__init__.py` of every package that a module is in, and its own file."""
    return [file for file in _files(module, None) if not is_installed(str(file))]


def _imports(file: Path, text: str | bytes, folder: Path) -> Iterator[Path]:
    """The files of what a text imports; `folder` is the first place of `sys.path` where it runs."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _files(alias.name, folder)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            for alias in node.names:  # a name of the module, or a module of the package
                yield from _files(f"{node.module}.{alias.name}", folder)
        elif isinstance(node, ast.ImportFrom):
            package = [file, *file.parents][node.level]
            yield from _own_file(package)
            for alias in node.names:
                name = f"{node.module}.{alias.name}" if node.module else alias.name
                yield from _below(name, [str(package)])


def _files(name: str, folder: Path | None) -> Iterator[Path]:
    """The files of the module `a.b.c` and of the packages that it is in, as far as they are there."""
    first, _, rest = name.partition(".")
    spec = PathFinder.find_spec(first, [str(folder)]) if folder else None
    spec = spec or PathFinder.find_spec(first)
    if spec is None:
        with suppress(ImportError, ValueError):
            spec = importlib.util.find_spec(first)  # nothing is imported, since the name has no dot
    yield from _files_of(spec, rest)


def _files_of(spec: ModuleSpec | None, rest: str) -> Iterator[Path]:
    if spec is None:
        return
    if spec.has_location and spec.origin and Path(spec.origin).is_file():
        yield Path(spec.origin)
    if rest and spec.submodule_search_locations:
        yield from _below(rest, list(spec.submodule_search_locations))


def _below(name: str, folders: Sequence[str]) -> Iterator[Path]:
    first, _, rest = name.partition(".")
    yield from _files_of(PathFinder.find_spec(first, folders), rest)


def _own_file(package: Path) -> Iterator[Path]:
    file = package / "__init__.py"
    if file.is_file():
        yield file

"""Mutants: which small mistakes in the source would no test notice? `make mutants ARGS=grpo/algorithm` looks.

Each mutant has one operator, constant, comparison or branch changed. The tests that reach its line run until one fails,
the quickest first, in a fork of a process that has loaded torch. What became of it is in runs/mutants.json at once, so
a run can be stopped and goes on. Where a source has changed, its mutants run again; where tests have, its survivors do.
`tests/mutants_explained.json` says why no test can notice the others.
"""

from __future__ import annotations

import argparse
import ast
import copy
import hashlib
import importlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULTS, EXPLAINED = ROOT / "runs/mutants.json", ROOT / "tests/mutants_explained.json"
PLACES = ("grpo/algorithm", "grpo/learner", "grpo/steps/collector.py", "grpo/steps/ahead.py", "rollout/drafts")
PLACES = (*PLACES, "rollout/environments/episodes.py", "rewards/ties.py", "rewards/verdicts.py")
MORE = {  # tests of a folder
    "rollout/drafts": ["tests/rollout/test_shard.py", "tests/rollout/test_engine.py"],
    "rewards": ["tests/grpo/algorithm/test_advantages.py"],
}
WARM = ("hypothesis", "peft", "ray", "torch", "transformers.models.deepseek_v3.modeling_deepseek_v3")
QUICK = "not slow and not gpu and not peer and not browser"
PAIRS = [
    *((ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.Is, ast.IsNot), (ast.In, ast.NotIn)),
    *((ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.And, ast.Or), (ast.BitAnd, ast.BitOr)),
]
OPPOSITE = {a: b for pair in PAIRS for a, b in (pair, pair[::-1])} | {ast.FloorDiv: ast.Mult, ast.Pow: ast.Mult}
OTHER_NAME = {"min": "max", "max": "min", "any": "all", "all": "any", "sum": "mean", "mean": "sum"}
PATIENCE_S, FIRST = 8.0, 5  # of the processor, of the tests that a mutant has survived; so many of them run in any case


def changes_of(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Which part of the node could be something else by mistake, and what it would be: one change at a time."""

    def with_(name: str, value: Any) -> tuple[ast.AST, str]:
        other = copy.copy(node)
        setattr(other, name, value)
        return node, ast.unparse(other)

    match node:
        case ast.Compare(ops=[op]) if type(op) in OPPOSITE:
            yield with_("ops", [OPPOSITE[type(op)]()])
        case ast.BinOp(op=op) | ast.AugAssign(op=op) | ast.BoolOp(op=op) if type(op) in OPPOSITE:
            yield with_("op", OPPOSITE[type(op)]())
        case ast.UnaryOp(op=ast.Not() | ast.USub() | ast.Invert()):
            yield node, ast.unparse(node.operand)
        case ast.Constant(value=bool(value)):
            yield node, str(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield node, str(value + 1)
        case ast.Name(id=name) if name in OTHER_NAME:
            yield node, OTHER_NAME[name]
        case ast.Attribute(attr=name) if name in OTHER_NAME:
            yield with_("attr", OTHER_NAME[name])
        case ast.comprehension(ifs=tests):
            yield from ((test, "True") for test in tests)
        case ast.Expr(value=ast.Call() | ast.Await()) | ast.Raise():
            yield node, "pass"
    is_branch = isinstance(node, ast.If | ast.While | ast.IfExp)
    if is_branch and not isinstance(node.test, ast.Compare | ast.UnaryOp):  # whose opposites are there already
        yield node.test, f"not ({ast.unparse(node.test)})"


def mutants_of(source: str) -> dict[str, tuple[int, str]]:
    """The line and the new source of each mutant, by a name that stays while its statement does."""
    rows = source.encode().splitlines(keepends=True)
    start_of_row = [sum(map(len, rows[:number])) for number in range(len(rows))]
    mutants: dict[str, tuple[int, str]] = {}

    def visit(node: ast.AST, place: str, statement: str) -> None:
        if isinstance(node, ast.stmt):
            statement = ast.unparse(node).splitlines()[0]
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            place = f"{place}.{node.name}".lstrip(".")
        for part, text in changes_of(node):
            start = start_of_row[part.lineno - 1] + part.col_offset
            end = start_of_row[part.end_lineno - 1] + part.end_col_offset
            text = f"({text})" if isinstance(part, ast.expr) else text
            name = f"{place}: {statement}: {ast.unparse(part).splitlines()[0]} -> {text}"
            while name in mutants:
                name += " again"
            mutants[name] = (part.lineno, (b"".join(rows)[:start] + text.encode() + b"".join(rows)[end:]).decode())
        for field, value in ast.iter_fields(node):
            for child in value if isinstance(value, list) else [value]:
                is_text = isinstance(child, ast.JoinedStr) or (isinstance(node, ast.Raise) and field == "exc")
                is_text |= isinstance(child, ast.keyword) and child.arg in ("strict", "frozen")  # guards
                is_text |= isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
                if isinstance(child, ast.AST) and not is_text and field not in ("annotation", "returns"):
                    visit(child, place, statement)

    visit(ast.parse(source), "", "")
    return mutants


class Reach:
    """A plugin of pytest: which lines of the files in a folder each test reaches, and how long it takes."""

    def __init__(self, folder: Path):
        self.folder = f"{folder}/"
        self.lines: dict[str, set[tuple[str, int]]] = {}
        self.seconds: dict[str, float] = {}
        self.everywhere: set[tuple[str, int]] = set()  # by imports and what tests share: these lines concern each test
        self.here = self.everywhere

    def trace(self, frame: Any, event: str, argument: Any) -> Callable | None:
        file = frame.f_code.co_filename
        if not file.startswith(self.folder):
            return None
        self.here.add((file, frame.f_lineno))
        return self.trace

    def pytest_sessionstart(self) -> None:
        threading.settrace(self.trace)
        sys.settrace(self.trace)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        before, self.here = self.here, self.here if fixturedef.scope == "function" else self.everywhere
        try:
            return (yield)
        finally:
            self.here = before

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        start, self.here = time.process_time(), set()
        try:
            return (yield)
        finally:
            self.lines[item.nodeid], self.seconds[item.nodeid] = self.here, time.process_time() - start
            self.here = self.everywhere


class Only:
    """A plugin of pytest: these tests, in this order."""

    def __init__(self, names: list[str]):
        self.names = names

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        by_name = {item.nodeid: item for item in items}
        items[:] = [by_name[name] for name in self.names]


def in_fork(work: Callable[[], int], limit_s: float) -> int | None:
    """The exit status of work in a process of its own, which is ended with all that it started after this time."""

    def alone() -> None:
        os.setsid()
        for number in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
        os._exit(work())

    process = multiprocessing.get_context("fork").Process(target=alone)
    process.start()
    try:
        process.join(limit_s)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
    return process.exitcode


def run_tests(tree: Path, words: list[str], plugin: object) -> int:
    """Runs pytest in this process, whose packages are those of the tree."""
    os.chdir(tree)
    sys.path.insert(0, str(tree))
    options = ["-x", "-q", "-p", "no:cacheprovider", "-m", QUICK, f"--basetemp={tree}/tmp"]
    return int(pytest.main([*options, *words], plugins=[plugin]))


def reach_of(tree: Path, folder: str, words: list[str]) -> Reach:
    """What the tests reach in the files of the folder as they are, and that they pass."""
    reach, answer = Reach(tree / folder), tree / "reach.json"

    def work() -> int:
        status = run_tests(tree, words, reach)
        lines = {name: list(places | reach.everywhere) for name, places in reach.lines.items()}
        answer.write_text(json.dumps([lines, reach.seconds]))
        return status

    if in_fork(work, 3600) != 0:
        sys.exit(f"the tests of {folder} do not pass as they are: {' '.join(words)}")
    lines, reach.seconds = json.loads(answer.read_text())
    reach.lines = {name: {(file, line) for file, line in places} for name, places in lines.items()}
    return reach


def meet(tree: Path, file: str, reach: Reach, line: int, source: str) -> str:
    """What becomes of one mutant."""
    names, total, mirror = [], 0.0, f"/test_{Path(file).name}::"
    for name in sorted(reach.seconds, key=lambda name: (mirror not in name, reach.seconds[name])):
        is_reached = (str(tree / file), line) in reach.lines[name]
        if is_reached and (len(names) < FIRST or total + reach.seconds[name] < PATIENCE_S):
            names, total = [*names, name], total + reach.seconds[name]
    if not names:
        return "unreached"

    def work() -> int:
        (tree / file).write_text(source)
        resource.setrlimit(resource.RLIMIT_CPU, (int(20 + 3 * total), int(30 + 3 * total)))
        sys.dont_write_bytecode = True
        return run_tests(tree, sorted({name.partition("::")[0] for name in names}), Only(names))

    try:
        return "survived" if in_fork(work, 600 + 20 * total) == 0 else "killed"
    finally:
        shutil.copy2(ROOT / file, tree / file)  # with its time, so that its bytecode counts again


def examine(tree: Path, file: str, results: dict[str, Any], reaches: dict[str, Reach]) -> None:
    """Meets all mutants of a file that have not been met yet, and writes down each at once."""
    folder = "/".join(file.split("/")[:-1][:2])
    words = [f"tests/{folder}", *MORE.get(folder, [])]
    tests = [path for word in words for path in [ROOT / word, *(ROOT / word).rglob("*.py")] if path.is_file()]
    texts = {"source": [ROOT / file], "tests": sorted(tests)}
    state = {key: hashlib.sha256(b"".join(path.read_bytes() for path in texts[key])).hexdigest()[:16] for key in texts}
    known = results.get(file, {"mutants": {}})
    met = known["mutants"] if known.get("source") == state["source"] else {}
    if known.get("tests") != state["tests"]:
        met = {name: status for name, status in met.items() if status == "killed"}
    results[file] = state | {"mutants": met}
    mutants = mutants_of((ROOT / file).read_text(encoding="utf-8"))
    waiting = [name for name in mutants if name not in met]
    if waiting and folder not in reaches:
        reaches[folder] = reach_of(tree, folder, words)
    for number, name in enumerate(waiting, 1):
        met[name] = meet(tree, file, reaches[folder], *mutants[name])
        print(f"{file} {number}/{len(waiting)}: {met[name]}: {name}", flush=True)
        RESULTS.with_suffix(".new").write_text(json.dumps(results, indent=1))
        RESULTS.with_suffix(".new").replace(RESULTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("places", nargs="*", default=PLACES, help="files or folders")
    places = parser.parse_args().places
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    for name in WARM:
        importlib.import_module(name)
    RESULTS.parent.mkdir(exist_ok=True)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    chosen = [path for word in places for path in [ROOT / word, *sorted((ROOT / word).rglob("*.py"))]]
    files = [str(path.relative_to(ROOT)) for path in chosen if path.is_file() and path.name != "__init__.py"]
    reaches: dict[str, Reach] = {}
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        shutil.copytree(ROOT, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*", "runs", "models", "site"))
        for file in files:
            examine(Path(folder).resolve(), file, results, reaches)
    explained = json.loads(EXPLAINED.read_text()) if EXPLAINED.exists() else {}
    for file in files:
        met = results[file]["mutants"]
        alive = [name for name in met if met[name] != "killed" and name not in explained.get(file, {})]
        print(f"{file}: {len(met)} mutants, {list(met.values()).count('killed')} killed, {len(alive)} to be explained")
        print("".join(f"  {met[name]}: {name}\n" for name in alive), end="")


if __name__ == "__main__":
    main()

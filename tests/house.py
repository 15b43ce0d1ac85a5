"""The size and the structure of the house in numbers, each with its definition. `make house` prints them.

`tests/house_budgets.json` holds the most that each number may be. `python tests/house.py --lower` writes the numbers
that have fallen into it, and never a higher one: to raise a budget, change the file by hand and say why in the commit.
"""

from __future__ import annotations

import argparse
import ast
import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUDGETS = ROOT / "tests" / "house_budgets.json"
PACKAGES = ("policies", "rollout", "rewards", "grpo")
OPTIONED = ("rewards", "grpo")  # the packages that have options
MOST_PARAMETERS = 8
SHAPES = ("policy", "trunk", "model", "decoder", "tokenizer")  # whose `config` is that of a model

# The files without which GRPO on one process is impossible: one policy, one engine, one learner, one loop. What a run
# can do without is not here: workers, drafts, graphs, vLLM, agents, environments, few bits, ranks, the value head, a
# teacher, curricula, alarms, evaluation, checkpoints and records of a run, the command line, pages.
CORE = """
policies/__init__ policies/policy policies/checkpoint policies/layout policies/logprobs policies/attention
policies/publication policies/decoding/absorbed policies/decoding/latent_cache policies/decoding/linear
policies/decoding/experts policies/routing/routers
rollout/__init__ rollout/engine rollout/group rollout/local_pool rollout/pool
rollout/pools rollout/results rollout/rows rollout/sampling rollout/shard rollout/stage
rollout/stop_strings rollout/backends/__init__
rewards/__init__ rewards/config/data rewards/config/reward rewards/data/examples rewards/group_score
rewards/protocol rewards/scorer rewards/spec rewards/ties
grpo/__init__ grpo/train grpo/session grpo/steps/loop grpo/steps/collector grpo/steps/listener grpo/steps/publisher
grpo/task/task grpo/task/sampling
grpo/source/policy_source
grpo/algorithm/advantages grpo/algorithm/losses grpo/algorithm/surrogates
grpo/config/features grpo/config/learner grpo/config/loss grpo/config/run
grpo/config/sampling grpo/data/prompts
grpo/learner/batch grpo/learner/build grpo/learner/learner grpo/learner/likelihood grpo/learner/optimizer
grpo/learner/row grpo/learner/tree
grpo/learner/prepare grpo/learner/update grpo/learner/terms/policy grpo/learner/terms/term
"""


# ---- imports --------------------------------------------------------------------------------------------------------


def modules_of(root: Path, package: str) -> dict[str, Path]:
    """`rollout.drafts.head` and its file, and the like; a package's own name is that of its __init__.py."""
    files = sorted((root / package).rglob("*.py"))
    return {".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def modules_imported(module: str, file: Path, modules: Mapping[str, Path]) -> set[str]:
    """Which of `modules` this one imports: at its top, inside functions and under TYPE_CHECKING.

    A module that is named in a text, as in a registry that imports by name, counts as imported.
    """
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    names = _names_imported(package, file.read_text(encoding="utf-8"))
    return {name if name in modules else source for name, source in names} & set(modules) - {module}


@functools.cache  # several numbers ask for it
def _names_imported(package: str, text: str) -> set[tuple[str, str]]:
    """Each name that is imported by a text of this package, and the module that has it where it is none itself."""
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {(alias.name, alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            folders = package.split(".")
            above = folders[: len(folders) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            imported |= {(f"{source}.{alias.name}", source) for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            name = node.value.partition(":")[0]
            imported |= {(name, name)} if "." in name else set()
    return imported


def room_of(module: str) -> str:
    """The folder or the loose file of a package that a module is in: `run` of `grpo.run.log`."""
    return (*module.split("."), "__init__")[1]


def arrows_of(root: Path, package: str = "grpo") -> dict[str, set[str]]:
    """Which rooms each room of a package imports."""
    modules = modules_of(root, package)
    rooms: dict[str, set[str]] = {room_of(module): set() for module in modules}
    for module, file in modules.items():
        rooms[room_of(module)] |= {room_of(other) for other in modules_imported(module, file, modules)}
    return {room: others - {room} for room, others in rooms.items()}


def floors_of(rooms: Mapping[str, set[str]]) -> int:
    """How many rooms the longest chain of imports has. Raises CycleError where there is a circle."""
    height: dict[str, int] = {}
    for room in TopologicalSorter(rooms).static_order():  # what a room imports comes before it
        height[room] = 1 + max((height[other] for other in rooms[room]), default=0)
    return max(height.values())


def circle_of(graph: Mapping[str, set[str]]) -> str:
    """A circle of the graph in words, or nothing."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return " <- ".join(error.args[1])
    return ""


# ---- functions ------------------------------------------------------------------------------------------------------


def functions_of(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def parameters_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Without self and cls; `*rest` and `**rest` count one each."""
    arguments = function.args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    rest = [argument for argument in (arguments.vararg, arguments.kwarg) if argument]
    return len([name for name in names if name not in ("self", "cls")]) + len(rest)


def stays_of_config(tree: ast.AST, sections: Iterable[str]) -> int:
    """Calls that hand the whole configuration or a section of it on: arguments `config`, `x.config`, `config.rollout`.

    What only asks for a type (`isinstance`) hands nothing on, and the `config` of a model is another thing.
    """
    sections = set(sections)

    def is_config(value: ast.expr) -> bool:
        if isinstance(value, ast.Name):
            return value.id == "config"
        if not isinstance(value, ast.Attribute):
            return False
        of_model = ast.unparse(value.value).rpartition(".")[2] in SHAPES
        return (value.attr == "config" and not of_model) or (value.attr in sections and is_config(value.value))

    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) != "isinstance"]
    handed = [[*call.args, *(keyword.value for keyword in call.keywords)] for call in calls]
    return sum(any(is_config(value) for value in values) for values in handed)


# ---- counts ---------------------------------------------------------------------------------------------------------


def lines_of(files: Iterable[Path]) -> int:
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def source_files(root: Path, *folders: str) -> list[Path]:
    """What is written by hand and runs: Python, scripts and styles of the page."""
    endings = {".py", ".js", ".css", ".html", ".sh"}
    return sorted(file for folder in folders for file in (root / folder).rglob("*") if file.suffix in endings)


_FRESH = """
import grpo.train, json, sys
answer = {"files": [module.__file__ for name, module in sys.modules.items() if name.split(".")[0] in sys.argv[1:]]}

import grpo.run.metrics
grpo.run.metrics.documented()
answer["training"] = [*sys.modules]

from grpo.cli.parse import _commands
from rewards.config.options import _options
answer["keys"] = {
    name: [option.key for option in _options(command.options.model_construct())]
    for name, command in _commands().items()
    if command.options
}
"""


def fresh(root: Path, more: str = "") -> dict[str, Any]:
    """Tells what a fresh interpreter finds: our `files` that `import grpo.train` loads, all modules that `training`
    loads, the `keys` that each command accepts in a file or as `--key` (below an item of a list `key[].name`), and what
    `more` code adds to its `answer`."""
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-c", f"{_FRESH}{more}\nprint(json.dumps(answer))", *PACKAGES]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def sections_of(root: Path) -> set[str]:
    """The names of the sections of options: fields of a class of options that are classes of options themselves."""
    trees = [
        ast.parse(file.read_text(encoding="utf-8")) for package in OPTIONED for file in (root / package).rglob("*.py")
    ]
    classes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    fields = [field for cls in classes for field in cls.body if isinstance(field, ast.AnnAssign)]
    return {ast.unparse(field.target) for field in fields if "Options" in ast.unparse(field.annotation)}


def counts(answer: Mapping[str, Any], root: Path = ROOT) -> dict[str, int]:
    """Every number that has a budget, by name; `answer` is that of `fresh`."""
    trees = {file: ast.parse(file.read_text(encoding="utf-8")) for p in PACKAGES for file in (root / p).rglob("*.py")}
    rooms, sections = arrows_of(root), sections_of(root)
    loaded, keys = [Path(file) for file in answer["files"]], answer["keys"]
    functions = [function for tree in trees.values() for function in functions_of(tree)]
    stays = [
        stays_of_config(tree, sections) for file, tree in trees.items() if file.relative_to(root).parts[0] in OPTIONED
    ]
    return {
        "lines of the product": lines_of(source_files(root, *PACKAGES)),
        "lines of the core": lines_of(root / f"{name}.py" for name in CORE.split()),
        "lines of tests": lines_of(source_files(root, "tests")),
        "lines of benchmarks": lines_of(source_files(root, "benchmarks")),
        "rooms of grpo": len(rooms),
        "floors of grpo": floors_of(rooms),
        "arrows between rooms of grpo": sum(map(len, rooms.values())),
        "modules that import grpo.train loads": sum(lines_of([file]) > 1 for file in loaded),  # one line is none
        "lines that import grpo.train loads": lines_of(loaded),
        **{f"options of {command}": len(names) for command, names in sorted(keys.items())},
        "options of all commands": len({name for names in keys.values() for name in names}),
        f"functions with more than {MOST_PARAMETERS} parameters": sum(
            parameters_of(function) > MOST_PARAMETERS for function in functions
        ),
        "lines of the longest function": max((f.end_lineno or f.lineno) - f.lineno + 1 for f in functions),
        "stays of config": sum(stays),
        "files with stays of config": sum(map(bool, stays)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lower", action="store_true", help="write the numbers that have fallen into the budgets")
    lower = parser.parse_args().lower
    numbers, budgets = counts(fresh(ROOT)), json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
    for name, number in numbers.items():
        budget = budgets.get(name)
        note = "" if budget in (None, number) else f"   (budget {budget})"
        print(f"{number:7,}  {name}{note}")
    if lower:
        fallen = {name: min(number, budgets.get(name, number)) for name, number in numbers.items()}
        BUDGETS.write_text(json.dumps(fallen, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""The size and the structure of the packages in numbers: `make house` prints them.

`python tests/house.py --against REF` prints those of another commit, too. It exits with 1 if settings, floors, arrows
or loaded modules rise and no commit since REF has a line `Reason: ...` in its message.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import tokenize
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from statistics import median
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("policies", "rollout", "rewards", "review", "grpo")
PAGES = ("*.md", "docs/**/*.md", "benchmarks/**/*.md", "examples/**/*.md")
CPU_SECONDS = ".cache/cpu_seconds.json"  # of the last whole runs of tests, written by conftest.py

# The files without which GRPO on one process is impossible: one policy, one engine, one learner, one loop. What a run
# can do without is not here: workers, drafts, graphs, vLLM, agents, environments, few bits, ranks, the value head, a
# teacher, curricula, alarms, evaluation, checkpoints and records of a run, the command line, pages.
CORE = """
policies/__init__ policies/policy policies/checkpoint policies/layout policies/logprobs policies/attention
policies/synced_weights policies/decoding/absorbed policies/decoding/latent_cache policies/decoding/linear
policies/decoding/experts policies/routing/routers rollout/__init__ rollout/decoding/engine rollout/group
rollout/workers/local_pool rollout/pool rollout/workers/kinds rollout/decoding/results rollout/rows rollout/sampling
rollout/decoding/settings rollout/decoding/rounds rollout/decoding/reader rollout/decoding/postprocess
rollout/decoding/batch rollout/decoding/shard rollout/decoding/stage rollout/stop_strings
rollout/backends/__init__ rewards/__init__ rewards/config/data rewards/config/reward rewards/data/examples
rewards/group_score rewards/protocol rewards/scorer rewards/spec rewards/ties grpo/__init__ grpo/train grpo/session
grpo/steps/loop grpo/steps/collector grpo/steps/callback grpo/steps/weight_sync grpo/task/task grpo/task/sampling
grpo/source/policy_source grpo/algorithm/advantages grpo/algorithm/losses grpo/algorithm/surrogates
grpo/config/features grpo/config/learner grpo/config/loss grpo/config/run grpo/config/sampling grpo/data/prompts
grpo/learner/batch grpo/learner/build grpo/learner/learner grpo/learner/likelihood grpo/learner/optimizer
grpo/learner/row grpo/learner/tree grpo/learner/prepare grpo/learner/update grpo/learner/terms/policy
grpo/learner/terms/term
"""


def modules_of(root: Path, package: str) -> dict[str, Path]:
    """`rollout.drafts.head` and its file, and the like; a package's own name is that of its __init__.py."""
    files = sorted((root / package).rglob("*.py"))
    return {".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


@cache
def nodes_of(file: Path) -> list[ast.AST]:
    """All nodes of a module, which several questions are about."""
    return [*ast.walk(ast.parse(file.read_text(encoding="utf-8")))]


def modules_imported(module: str, file: Path, modules: Mapping[str, Path]) -> set[str]:
    """Which of `modules` this one imports: at its top, inside functions and under TYPE_CHECKING.

    A module that is named in a text, as in a registry that imports by name, counts as imported.
    """
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    imported = set()
    for node in nodes_of(file):
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
    return {name if name in modules else source for name, source in imported} & set(modules) - {module}


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


def street_of(root: Path) -> dict[str, set[str]]:
    """Which packages each package imports."""
    modules = {name: file for package in PACKAGES for name, file in modules_of(root, package).items()}
    street: dict[str, set[str]] = {module.split(".")[0]: set() for module in modules}
    for module, file in modules.items():
        street[module.split(".")[0]] |= {other.split(".")[0] for other in modules_imported(module, file, modules)}
    return {package: others - {package} for package, others in street.items()}


def floors_of(rooms: Mapping[str, set[str]]) -> int:
    """How many rooms the longest chain of imports has. Raises CycleError where there is a circle."""
    height: dict[str, int] = {}
    for room in TopologicalSorter(rooms).static_order():  # what a room imports comes before it
        height[room] = 1 + max((height[other] for other in rooms[room]), default=0)
    return max(height.values(), default=0)


def circle_of(graph: Mapping[str, set[str]]) -> str:
    """A circle of the graph in words, or nothing."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return " <- ".join(error.args[1])
    return ""


LAYOUT = (tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def count(text: str) -> Counter[str]:
    """Tokens (names, operators, literals; no comments, no docstrings), the lines of code that have some, and the like.

    A nested comprehension is inside of another one, or has two `for`.
    """
    nodes = [*ast.walk(ast.parse(text))]
    documented: set[int] = set()
    for node in nodes:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            documented.update(range(node.lineno, node.end_lineno + 1))
    counted, rows = Counter[str](), set[int]()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        is_docstring = token.type == tokenize.STRING and token.start[0] in documented
        if token.type == tokenize.COMMENT:
            counted["comments"] += 1
        elif token.type not in LAYOUT and not is_docstring:
            counted["tokens"] += 1
            rows.update(range(token.start[0], token.end[0] + 1))
    loops = [node for node in nodes if isinstance(node, COMPREHENSIONS)]
    inner = {id(node) for loop in loops for node in ast.walk(loop) if node is not loop}
    counted["lines of code"] = len(rows)
    counted["comprehensions"] = len(loops)
    counted["nested comprehensions"] = sum(id(loop) in inner or len(loop.generators) > 1 for loop in loops)
    counted["conditional expressions"] = sum(isinstance(node, ast.IfExp) for node in nodes)
    return counted


def count_files(files: Iterable[Path]) -> Counter[str]:
    return sum((count(file.read_text(encoding="utf-8")) for file in files), Counter())


def density(counted: Counter[str]) -> dict[str, float]:
    """Per 1,000 lines of code."""
    names = ("comprehensions", "nested comprehensions", "conditional expressions", "comments")
    return {name: round(1000 * counted[name] / max(counted["lines of code"], 1), 1) for name in names}


def function_lengths(files: Iterable[Path]) -> list[int]:
    lengths = []
    for file in files:
        for node in nodes_of(file):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lengths.append(node.end_lineno - node.lineno + 1)
    return sorted(lengths)


def scalars_of(files: Iterable[Path]) -> int:
    """The keys and values of tables in YAML."""
    events = (event for file in files for event in yaml.parse(file.read_text(encoding="utf-8")))
    return sum(isinstance(event, yaml.ScalarEvent) for event in events)


def lines_of(files: Iterable[Path]) -> int:
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def core_of(root: Path) -> list[Path]:
    files = (root / f"{name}.py" for name in CORE.split())
    return [file for file in files if file.is_file()]  # another commit may lack some


_FRESH = """
import grpo.train, json, sys
answer = {"files": [module.__file__ for name, module in sys.modules.items() if name.split(".")[0] in sys.argv[1:]]}

import grpo.run.log
grpo.run.log.check("loss/kl")
answer["training"] = [*sys.modules]

from grpo.cli.parse import _commands
from rewards.config.options import _options
answer["settings"] = {
    name: [option.key for option in _options(command.options.model_construct()) if option.model is None]
    for name, command in _commands().items()
    if command.options
}
"""


def fresh(root: Path, more: str = "") -> dict[str, Any]:
    """What a fresh interpreter finds: our `files` that `import grpo.train` loads, all modules that `training` loads,
    the `settings` of each command, without sections and lists of mappings, and what `more` code adds to `answer`."""
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-c", f"{_FRESH}{more}\nprint(json.dumps(answer))", *PACKAGES]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def once(keys: Iterable[str]) -> set[str]:
    """Each setting once: `data.limit` and `data.sources[].limit` are one, and so is `data[].limit`."""
    return {key.replace("[]", "").replace("data.sources.", "data.") for key in keys}


GUARDED = ("settings", "floors", "arrows", "modules")  # what begins so rises for a reason alone


def numbers(root: Path, answer: Mapping[str, Any]) -> dict[str, float]:
    """Every number by name; `answer` is that of `fresh`."""
    settings = {command: once(keys) for command, keys in answer["settings"].items()}
    found: dict[str, float] = {"settings of quartet train": len(settings["train"])}
    found["settings of all commands"] = len(set().union(*settings.values()))
    street = street_of(root)
    found |= {"packages": len(street), "floors of packages": floors_of(street)}
    found["arrows between packages"] = sum(map(len, street.values()))
    for package in ("grpo", "rollout", "review"):
        rooms = arrows_of(root, package)  # none in a commit that lacks the package
        found |= {f"rooms of {package}": len(rooms), f"floors of {package}": floors_of(rooms)}
        found[f"arrows between rooms of {package}"] = sum(map(len, rooms.values()))
    loaded = [Path(file) for file in answer["files"]]
    found["modules that import grpo.train loads"] = sum(lines_of([file]) > 1 for file in loaded)  # one line is none
    found["lines that import grpo.train loads"] = lines_of(loaded)

    product = [file for package in PACKAGES for file in (root / package).rglob("*.py")]
    scalars = scalars_of(file for package in PACKAGES for file in (root / package).rglob("*.yaml"))
    for name, files, more in (("product", product, scalars), ("core", core_of(root), 0)):
        counted = count_files(files)
        found[f"tokens of the {name}"] = counted["tokens"] + more
        found[f"lines of code of the {name}"] = counted["lines of code"]
        found |= {f"{what} per 1,000 lines of the {name}": value for what, value in density(counted).items()}
    found["of these tokens keys and values of YAML"] = scalars
    lengths = function_lengths(product)
    found |= {"lines of a function, median": median(lengths), "lines of the longest function": lengths[-1]}
    found["lines of a function, 95th percentile"] = lengths[len(lengths) * 95 // 100]
    pages = {page for pattern in PAGES for page in root.glob(pattern)} - {root / "docs/reference.md"}  # of options
    found["words of docs"] = sum(len(page.read_text(encoding="utf-8").split()) for page in pages)
    found["lines of tests"] = lines_of((root / "tests").rglob("*.py"))
    return found


def numbers_of(ref: str) -> dict[str, float]:
    """The numbers of another commit, counted as here."""
    archive = subprocess.run(["git", "archive", ref], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
    with tempfile.TemporaryDirectory(prefix="house-") as folder:
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(folder, filter="data")
        root = Path(folder).resolve()
        return numbers(root, fresh(root))


def has_reason(ref: str) -> bool:
    """Whether a commit since this one says why a number has risen."""
    command = ["git", "log", "--format=%B", f"{ref}..HEAD"]
    messages = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return bool(re.search(r"^Reason: \S", messages, re.MULTILINE))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", metavar="REF", help="print the numbers of this commit, too, and compare")
    parser.add_argument("--files", action="store_true", help="print tokens and densities of each file of the core")
    args = parser.parse_args()
    if args.files:
        for file in core_of(ROOT):
            counted = count_files([file])
            print(f"{file.relative_to(ROOT)}: {counted['tokens']:,} tokens, per 1,000 lines {density(counted)}")
        return 0
    now, before = numbers(ROOT, fresh(ROOT)), numbers_of(args.against) if args.against else {}
    for name, number in now.items():
        print(f"{before[name]:9,} -> {number:7,}  {name}" if before else f"{number:9,}  {name}")
    measured = json.loads((ROOT / CPU_SECONDS).read_text()) if (ROOT / CPU_SECONDS).is_file() else {}
    for tests, seconds in measured.items():
        print(f"{seconds:9,}  CPU seconds of `pytest -m '{tests}'`")
    if not measured:
        print("CPU seconds of tests: not measured")
    rising = [name for name in before if name.startswith(GUARDED) and now[name] > before[name]]
    if rising and not has_reason(args.against):
        print(f"These rise: {', '.join(rising)}. A commit message must say why: `Reason: ...`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Who imports whom, what is shipped, and what no file may contain."""

import ast
import importlib
import os
import subprocess
import sys
import tomllib
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import house
import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "policies": set(),
    "rollout": {"policies", "rewards"},  # of rewards the isolated processes and an episode alone, see below
    "rewards": set(),
    "review": {"rewards"},
    "grpo": {"policies", "rollout", "rewards", "review"},
}
# The rooms of grpo from top to bottom: each imports those below it alone.
FLOORS = (
    ("__init__", "__main__"),
    ("cli",),
    ("train", "sft"),
    ("session", "trl_bridge"),
    ("steps", "evaluation", "tinker"),
    ("task",),
    ("source", "endpoint"),
    ("learner",),
    ("run",),
    ("data", "algorithm"),
    ("config",),
)
# What `import grpo.train` does not load: a run imports these when it is asked for them.
FEATURES = (
    *("grpo.cli", "grpo.endpoint", "grpo.cli.launch", "grpo.cli.mtp", "grpo.trl_bridge", "grpo.tinker"),
    *("review.compare", "review.findings", "review.page", "review.readers.old_metrics"),
    *("grpo.algorithm.in_flight",),
    *("rewards.data.reasoning_gym", "rewards.data.word_problems"),
    *("grpo.learner.eight_bit", "grpo.learner.terms.custom", "grpo.learner.terms.supervised"),
    *("grpo.learner.terms.balance", "grpo.learner.terms.distill", "grpo.learner.terms.draft_head"),
    *("grpo.learner.terms.teacher_server", "grpo.learner.terms.value"),
    *("grpo.run.panel", "grpo.source.agreement", "grpo.source.vllm_token"),
    *("grpo.steps.vllm", "grpo.task.reward_models", "policies.conversion", "policies.decoding", "policies.files.hub"),
    *("policies.files.packed", "rewards.built_in", "rewards.http_post", "rewards.isolation.pool", "rollout.backends"),
    *("rollout.compiled", "rollout.decoding.costs", "rollout.decoding.engine", "rollout.drafts"),
    *("rollout.environments", "rollout.places", "rollout.weight_sync.message", "rollout.weight_sync.rounded"),
    *("rollout.requests.serving", "rollout.stop_strings", "rollout.workers.actors", "rollout.workers.cluster"),
    *("rollout.workers.ray_pool", "rollout.workers.worker"),
    *("bitsandbytes", "datasets", "gguf", "ray", "reasoning_gym", "starlette", "uvicorn", "vllm"),
)
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
PAGES = ("reference", "guides/combinations", "guides/findings")
MORE = f"""
import contextlib, io, runpy
import rollout.workers.ray_pool
answer["ray"] = [*sys.modules]
for page in {PAGES}:
    with contextlib.redirect_stdout(io.StringIO()) as written:
        runpy.run_path(f"docs/write_{{page.rpartition('/')[2]}}.py", run_name="__main__")
    answer[page] = written.getvalue()
"""
NOT_SHIPPED = {"tests", "examples", "benchmarks"}
PICKLES = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def _sources(root: Path) -> list[Path]:
    return sorted(file for package in MAY_IMPORT for file in (root / package).rglob("*.py"))


def _imports(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """The top-level names that a module imports, inside functions and TYPE_CHECKING too."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield (node.module or "").split(".")[0]


def _against_the_arrows(root: Path) -> list[str]:
    wrong = []
    for file in _sources(root):
        package = file.relative_to(root).parts[0]
        forbidden = (set(MAY_IMPORT) | NOT_SHIPPED) - MAY_IMPORT[package] - {package}
        imported = set(_imports(house.nodes_of(file)))
        wrong += [f"{file.relative_to(root)} imports {name}" for name in sorted(forbidden & imported)]
    return wrong


def _circles(root: Path, package: str) -> list[str]:
    """A circle of modules, and one of rooms."""
    modules = house.modules_of(root, package)
    imports = {name: house.modules_imported(name, file, modules) for name, file in modules.items()}
    return [circle for graph in (imports, house.arrows_of(root, package)) if (circle := house.circle_of(graph))]


def _upwards(root: Path, floors: Sequence[Collection[str]]) -> list[str]:
    """Imports inside grpo that go up, or to another room of the same floor."""
    modules, floor = house.modules_of(root, "grpo"), {room: i for i, rooms in enumerate(floors) for room in rooms}
    wrong = []
    for module, file in modules.items():
        here = house.room_of(module)
        for other in sorted(house.modules_imported(module, file, modules)):
            there = house.room_of(other)
            if there != here and floor[there] <= floor[here]:
                wrong.append(f"{module} imports {other}")
    return wrong


def _unsafe(nodes: Iterable[ast.AST]) -> list[str]:
    """Ways to run code that came with data: pickles, eval and exec, code from a model's repository."""
    nodes = [*nodes]
    found = [f"imports {name}" for name in _imports(nodes) if name in PICKLES]
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            found += ["torch.load" for alias in node.names if alias.name == "load"]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in ("eval", "exec", "builtins.eval", "builtins.exec", "torch.load"):
            found.append(called)
        for keyword in node.keywords:
            is_false = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            if keyword.arg in ("trust_remote_code", "allow_pickle") and not is_false:
                found.append(f"{keyword.arg}={ast.unparse(keyword.value)}")
    return found


def _python(*words: str, cwd: Path = ROOT, path: Path | None = None) -> str:
    """Runs a fresh interpreter that does not put its working folder on the import path."""
    environment = os.environ | ({"PYTHONPATH": str(path)} if path else {})
    command = [sys.executable, "-P", *words]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def fresh() -> dict[str, Any]:
    """What one fresh interpreter finds and writes, since each takes 4 s to import torch and transformers."""
    return house.fresh(ROOT, MORE)


def test_imports_go_down_without_circles():
    assert len(_sources(ROOT)) > len(MAY_IMPORT)
    assert _against_the_arrows(ROOT) == []
    assert _upwards(ROOT, FLOORS) == []
    assert [circle for package in MAY_IMPORT for circle in _circles(ROOT, package)] == []
    assert set(house.PACKAGES) == set(MAY_IMPORT)
    assert house.circle_of(house.street_of(ROOT)) == ""


def _write(root: Path, **sources: str) -> None:
    """Files of small packages: `grpo__run__log="import x"` is grpo/run/log.py."""
    for name, source in sources.items():
        file = root / f"{name.replace('__', '/')}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)


def test_an_import_that_goes_up_and_a_circle_are_found(tmp_path):
    _write(
        tmp_path,
        policies__lora="def f():\n    from rollout.decoding.engine import Engine\n",
        rewards__text="from . import length\nimport tests.conftest\n",
        rewards__length="if TYPE_CHECKING:\n    from .text import score\n",
        rollout__pool="import torch, grpo.algorithm.losses\nfrom policies import lora\n",
        grpo__run__log="from grpo.task import Task\n",
        grpo__task="import policies, rollout, rewards\n",
        grpo__loop="HOME = 'grpo.task:Task'\n",
    )
    assert _against_the_arrows(tmp_path) == [
        "policies/lora.py imports rollout",
        "rewards/text.py imports tests",
        "rollout/pool.py imports grpo",
    ]
    assert _upwards(tmp_path, [("loop", "task"), ("run",)]) == [
        "grpo.loop imports grpo.task",
        "grpo.run.log imports grpo.task",
    ]
    assert len(_circles(tmp_path, "rewards")) == 2  # of modules, and of rooms
    assert _circles(tmp_path, "grpo") == []


def _of_rewards(source: str) -> set[str]:
    """The modules of rewards that a module of rollout imports and should not."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            whole = node.module == "rewards"
            found |= {f"rewards.{alias.name}" for alias in node.names} if whole else {node.module}
    allowed = ("rewards.isolation", "rewards.episode")
    return {name for name in found if name.split(".")[0] == "rewards" and not name.startswith(allowed)}


def test_rollout_takes_from_rewards_the_isolated_processes_and_what_an_episode_is():
    assert set().union(*(_of_rewards(file.read_text()) for file in (ROOT / "rollout").rglob("*.py"))) == set()
    assert _of_rewards("from rewards import Scorer, isolation\nimport rewards.episode") == {"rewards.Scorer"}


TEXT = '''
"""A docstring
of two lines."""


def mean(values):  # of some
    """Another one."""
    parts = [[x for x in value] for value in values]
    return sum(parts) / len(parts) if parts else 0.0
'''


def test_the_numbers_of_a_text_are_counted(tmp_path):
    assert house.count(TEXT) == {
        "tokens": 35,
        "lines of code": 3,
        "comments": 1,
        "comprehensions": 2,
        "nested comprehensions": 1,
        "conditional expressions": 1,
    }
    _write(tmp_path, grpo__mean=TEXT)
    assert house.function_lengths([tmp_path / "grpo/mean.py"]) == [4]
    (tmp_path / "table.yaml").write_text("names: {a: 1, b: [2, 3]}  # four values and keys, and a name\n")
    assert house.scalars_of([tmp_path / "table.yaml"]) == 6
    keys = ["data.limit", "data.sources[].limit", "data[].limit", "rewards[].weight", "data.sources[].weight"]
    assert house.once(keys) == {"data.limit", "data.weight", "rewards.weight"}


def test_no_file_runs_code_that_came_with_data():
    unsafe = {str(file.relative_to(ROOT)): _unsafe(house.nodes_of(file)) for file in _sources(ROOT)}
    assert {file: found for file, found in unsafe.items() if found} == {}
    for source, found in {
        "import pickle\nfrom torch import load\neval('1')": ["imports pickle", "torch.load", "eval"],
        "f(trust_remote_code=True)": ["trust_remote_code=True"],
        "np.load('x', allow_pickle=flag)": ["allow_pickle=flag"],
        "model.eval()\nf(trust_remote_code=False)": [],
    }.items():
        assert _unsafe(ast.walk(ast.parse(source))) == found


def _features_among(loaded: Sequence[str]) -> list[str]:
    return [name for name in FEATURES if any(f"{module}.".startswith(f"{name}.") for module in loaded)]


def test_training_loads_no_feature_that_nobody_has_asked_for(fresh):
    ours = [name for name in FEATURES if name.split(".")[0] in MAY_IMPORT]
    modules = {name for package in MAY_IMPORT for name in house.modules_of(ROOT, package)}
    assert [name for name in ours if name not in modules] == []
    loaded = _features_among(fresh["training"])
    assert [name for name in loaded if name != "bitsandbytes"] == []  # which peft imports where it is installed
    assert "rollout.workers.ray_pool" in _features_among(fresh["ray"])


@pytest.mark.parametrize("package", ["rewards", "review"])
def test_light_packages_load_neither_torch_nor_ray(package):
    code = f"import sys, pkgutil, importlib, {package}\n"
    code += f"for module in pkgutil.walk_packages({package}.__path__, '{package}.'):\n"
    code += "    importlib.import_module(module.name)\n"
    code += "print(*{'torch', 'ray', 'transformers'} & set(sys.modules))"
    assert _python("-c", code).split() == []


def test_diagnose_loads_neither_numpy_nor_what_the_page_needs():
    code = "import sys\nfrom review.__main__ import main\nassert main(sys.argv[1:]) == 0\n"
    heavy = {"torch", "ray", "transformers", "numpy", "tokenizers", "starlette", "uvicorn", "plotly"}
    code += f"print(*{heavy} & set(sys.modules))"
    *printed, loaded = _python("-c", code, "diagnose", "tests/cases/run_to_view").split("\n")[:-1]
    assert printed[-1] == "Nothing was found."
    assert loaded == ""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """All distributions as a user gets them: wheels made from source distributions, then installed into a folder."""
    folder = tmp_path_factory.mktemp("wheel")
    for project in (ROOT / "rewards", ROOT / "review", ROOT):
        _python("-m", "build", "--no-isolation", "--outdir", str(folder), str(project))
    files = sorted(folder.glob("*.whl"))
    assert len(files) == len(list(folder.glob("*.tar.gz"))) == 3
    options = ["--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check"]
    _python("-m", "pip", "install", "--quiet", *options, "--target", str(folder / "site"), *map(str, files))
    return folder / "site"


@pytest.mark.slow
def test_the_wheels_hold_the_packages_and_nothing_else(wheel):
    shipped = {file.relative_to(wheel).as_posix() for file in wheel.rglob("*") if file.is_file()}
    written = {
        file.relative_to(ROOT).as_posix()
        for package in MAY_IMPORT
        for file in (ROOT / package).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    files = ("pyproject.toml", "README.md", "LICENSE")
    of_the_project = {f"{package}/{name}" for package in ("rewards", "review") for name in files}
    commands = {"bin/quartet", "bin/quartet-reward", "bin/quartet-review"}
    assert {file for file in shipped if ".dist-info/" not in file} == (written - of_the_project) | commands
    assert {f"{package}/py.typed" for package in MAY_IMPORT} <= shipped

    def packages(distribution: str) -> set[str]:
        record = (wheel / f"{distribution}-{VERSION}.dist-info/RECORD").read_text().splitlines()
        return {line.partition("/")[0] for line in record if ".py," in line}

    assert packages("quartet_rewards") == {"rewards"}
    assert packages("quartet_review") == {"review"}
    assert packages("quartet_rl") == set(MAY_IMPORT) - {"rewards", "review"}
    for distribution, below in (("rl", "rewards"), ("rl", "review"), ("review", "rewards")):
        needed = (wheel / f"quartet_{distribution}-{VERSION}.dist-info/METADATA").read_text().splitlines()
        assert f"Requires-Dist: quartet-{below}=={VERSION}" in needed


@pytest.mark.slow
def test_the_wheels_work_from_an_empty_folder(wheel, tmp_path):
    code = f"import importlib\nfor package in {list(MAY_IMPORT)}:\n"
    code += "    module = importlib.import_module(package)\n"
    code += "    print(module.__file__, *[name for name in getattr(module, '__all__', ()) if hasattr(module, name)])"
    found = [line.split() for line in _python("-c", code, cwd=tmp_path, path=wheel).splitlines()]
    for package, (file, *names) in zip(MAY_IMPORT, found, strict=True):
        assert Path(file).parent == wheel / package
        assert set(names) == _public_names(package), package
    assert {"load_reward", "right_at"} <= _public_names("rewards")
    for command in ("quartet", "quartet-reward", "quartet-review"):
        printed = _python(str(wheel / "bin" / command), "--version", cwd=tmp_path, path=wheel)
        assert printed == f"{command} {VERSION}\n"
    usage = _python("-m", "grpo", "--help", cwd=tmp_path, path=wheel)
    assert all(command in usage for command in ("sft", "train", "eval", "sample", "serve", "convert"))


def _public_names(package: str) -> set[str]:
    """`__all__` as it is written in the package."""
    for node in ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def test_generated_pages_are_what_the_source_says(fresh):
    for page in PAGES:
        assert (ROOT / f"docs/{page}.md").read_text() == fresh[page], f"run `make reference` and commit docs/{page}.md"


def _from_ours(file: Path) -> list[tuple[str, str]]:
    """What a script takes from our packages: pairs of a module and a name."""
    nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in nodes if node.module and node.level == 0 and node.module.split(".")[0] in MAY_IMPORT]
    return [(node.module or "", alias.name) for node in ours for alias in node.names]


def test_what_scripts_import_from_the_packages_is_there():
    """Types are checked only in the packages, and most benchmarks are run by hand."""
    lost = []
    for file in sorted(file for folder in ("benchmarks", "docs", "examples") for file in (ROOT / folder).rglob("*.py")):
        for module, name in _from_ours(file):
            found = importlib.import_module(module)
            if not hasattr(found, name) and not importlib.util.find_spec(f"{module}.{name}"):
                lost.append(f"{file.relative_to(ROOT)}: {module}.{name}")
    assert lost == []

"""The house of DESIGN.md: who imports whom, how large it is, what is shipped, what no file may contain."""

import ast
import importlib
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import house
import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "policies": set(),
    "rollout": {"policies", "rewards"},  # of rewards the isolated processes and an episode alone, see below
    "rewards": set(),
    "grpo": {"policies", "rollout", "rewards"},
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
    ("learner", "view"),
    ("run",),
    ("data", "algorithm"),
    ("config",),
)
# What `import grpo.train` does not load: a run imports these when it is asked for them.
FEATURES = (
    *("grpo.cli", "grpo.endpoint", "grpo.cli.launch", "grpo.cli.mtp", "grpo.trl_bridge", "grpo.view", "grpo.tinker"),
    *("grpo.algorithm.alarms", "grpo.algorithm.in_flight", "rewards.data.reasoning_gym", "rewards.data.word_problems"),
    *("grpo.learner.eight_bit", "grpo.learner.terms.custom", "grpo.learner.terms.supervised"),
    *("grpo.learner.terms.balance", "grpo.learner.terms.distill", "grpo.learner.terms.draft_head"),
    *("grpo.learner.terms.teacher_server", "grpo.learner.terms.value"),
    *("grpo.run.panel", "grpo.source.agreement", "grpo.source.vllm_token"),
    *("grpo.steps.vllm", "grpo.task.reward_models", "policies.conversion", "policies.decoding", "policies.files.hub"),
    *("policies.files.packed", "rewards.built_in", "rewards.http_post", "rewards.isolation.pool", "rollout.backends"),
    *("rollout.cluster", "rollout.compiled", "rollout.costs", "rollout.drafts", "rollout.engine"),
    *("rollout.environments", "rollout.places", "rollout.publication.message", "rollout.publication.rounded"),
    *("rollout.ray_pool", "rollout.serving", "rollout.stop_strings", "rollout.worker", "rollout.workers"),
    *("bitsandbytes", "datasets", "gguf", "ray", "reasoning_gym", "starlette", "uvicorn", "vllm"),
)
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
PAGES = ("reference", "guides/combinations")
MORE = f"""
import contextlib, io, runpy
import rollout.ray_pool
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


def _imports(tree: ast.AST) -> Iterator[str]:
    """The top-level names that a module imports, inside functions and TYPE_CHECKING too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield (node.module or "").split(".")[0]


def _against_the_arrows(root: Path) -> list[str]:
    wrong = []
    for file in _sources(root):
        package = file.relative_to(root).parts[0]
        forbidden = (set(MAY_IMPORT) | NOT_SHIPPED) - MAY_IMPORT[package] - {package}
        imported = set(_imports(ast.parse(file.read_text(encoding="utf-8"))))
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


def _unsafe(source: str) -> list[str]:
    """Ways to run code that came with data: pickles, eval and exec, code from a model's repository."""
    tree = ast.parse(source)
    found = [f"imports {name}" for name in _imports(tree) if name in PICKLES]
    for node in ast.walk(tree):
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


def test_the_imports_follow_the_arrows():
    assert len(_sources(ROOT)) > len(MAY_IMPORT)
    assert _against_the_arrows(ROOT) == []


def test_an_import_against_the_arrows_is_found(tmp_path):
    for folder in (*MAY_IMPORT, "rewards/built_in"):
        (tmp_path / folder).mkdir()
    (tmp_path / "policies/lora.py").write_text("def f():\n    from rollout.engine import Engine\n")
    (tmp_path / "rollout/pool.py").write_text("import torch, grpo.algorithm.losses\nfrom policies import lora\n")
    (tmp_path / "rewards/text.py").write_text("from . import length\nimport tests.conftest\n")
    (tmp_path / "grpo/train.py").write_text("import policies, rollout, rewards\n")
    assert _against_the_arrows(tmp_path) == [
        "policies/lora.py imports rollout",
        "rewards/text.py imports tests",
        "rollout/pool.py imports grpo",
    ]


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
    allowed = "from rewards.isolation.pool import WorkerPool\nfrom rewards import isolation\nimport rewards.episode"
    assert _of_rewards(allowed) == set()
    wrong = "import rewards\nfrom rewards import Scorer, isolation\nfrom rewards.registry import find_reward"
    assert _of_rewards(wrong) == {"rewards", "rewards.Scorer", "rewards.registry"}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_has_no_circle(package):
    assert _circles(ROOT, package) == []


@pytest.fixture(scope="module")
def fresh() -> dict[str, Any]:
    """What one fresh interpreter finds and writes, since each takes 4 s to import torch and transformers."""
    return house.fresh(ROOT, MORE)


def test_no_number_of_the_house_is_above_its_budget(fresh):
    budgets = json.loads(house.BUDGETS.read_text())
    numbers = house.counts(fresh)
    assert numbers.keys() == budgets.keys()
    above = {name: (number, budgets[name]) for name, number in numbers.items() if number > budgets[name]}
    assert above == {}, "make it smaller, or raise the budget by hand and say why"


def test_the_numbers_of_a_small_house_are_counted(tmp_path):
    files = {
        "__init__": "_HOMES = {'train': 'grpo.train'}\n",
        "train": "import grpo.loop\ndef train(config, *, a, b, **rest):\n    loop(config.rollout)\n",
        "loop": "from grpo.run import log\nclass L:\n  def f(self, x): g(policy.config, isinstance(config, int))\n",
        "run/__init__": "",
        "run/log": "class C:\n    rollout: RolloutOptions\n",
    }
    for name, source in files.items():
        file = tmp_path / f"grpo/{name}.py"
        file.parent.mkdir(exist_ok=True, parents=True)
        file.write_text(source)
    rooms = house.arrows_of(tmp_path)
    assert rooms == {"__init__": {"train"}, "train": {"loop"}, "loop": {"run"}, "run": set()}
    assert (house.floors_of(rooms), house.sections_of(tmp_path)) == (4, {"rollout"})
    tree = ast.parse(files["train"])
    assert [house.parameters_of(function) for function in house.functions_of(tree)] == [4]
    assert house.stays_of_config(tree, {"rollout"}) == 1
    assert house.stays_of_config(ast.parse(files["loop"]), {"rollout"}) == 0
    assert (
        house.stays_of_config(ast.parse("f(run.config); g(x, of=self.config.rollout); h(config.steps)"), {"rollout"})
        == 2
    )
    assert house.lines_of(house.source_files(tmp_path, "grpo")) == 9


def test_the_arrows_between_the_rooms_of_grpo_go_down():
    assert _upwards(ROOT, FLOORS) == []


def test_an_arrow_that_goes_up_is_found(tmp_path):
    (tmp_path / "grpo/run").mkdir(parents=True)
    files = {"__init__": "", "run/__init__": "", "run/log": "from grpo.task import Task", "task": "", "loop": ""}
    for name, source in files.items():
        (tmp_path / f"grpo/{name}.py").write_text(source)
    (tmp_path / "grpo/loop.py").write_text("def f():\n    import grpo.task\n")
    assert _upwards(tmp_path, [("__init__",), ("task", "loop"), ("run",)]) == [
        "grpo.loop imports grpo.task",
        "grpo.run.log imports grpo.task",
    ]


@pytest.mark.parametrize(
    ("question", "file", "answer"),
    [
        ("where is the clip?", "grpo/algorithm/surrogates.py", "def clipped_surrogate("),
        ("who decides to save?", "grpo/steps/loop.py", "self.config.checkpoint.every"),
        ("what is a draft's cost?", "rollout/costs.py", "def measure("),
        ("where do rewards run?", "rewards/isolation/child.py", "def serve(socket_fd"),
        ("which room decides which policy a path means?", "grpo/source/policy_source.py", "def find_policy("),
        ("where do requests join a batch?", "rollout/serving.py", "def _join(self)"),
        ("who answers 429?", "grpo/endpoint/batcher.py", "class Full("),
    ],
)
def test_a_newcomers_question_is_answered_by_one_file(question, file, answer):
    """And by no other one, whose name would then mislead."""
    holders = [str(path.relative_to(ROOT)) for path in _sources(ROOT) if answer in path.read_text(encoding="utf-8")]
    assert holders == [file], question


@pytest.mark.parametrize(
    ("a", "b", "found"),
    [
        ("from house import b", "import os", []),
        ("from house.b import f", "def f():\n    from house import a", [{"a", "b"}] * 2),
        ("from . import b", "if TYPE_CHECKING:\n    from .a import g", [{"a", "b"}] * 2),
        ("import house.room.one", "x = 1\nimport house.room.two", []),
        ("from house.room import two", "", [{"a", "room"}]),  # one imports a: a circle of rooms
    ],
)
def test_a_circle_is_found(tmp_path, a, b, found):
    (tmp_path / "house/room").mkdir(parents=True)
    one = "from house import a" if "two" in a else ""
    files = {"__init__": "", "a": a, "b": b, "room/__init__": "", "room/one": one, "room/two": ""}
    for name, source in files.items():
        (tmp_path / f"house/{name}.py").write_text(source)
    circles = [{name.removeprefix("house.") for name in circle.split(" <- ")} for circle in _circles(tmp_path, "house")]
    assert circles == found


def test_no_module_has_a_name_that_says_nothing():
    assert [file for file in _sources(ROOT) if file.stem in ("types", "utils", "helpers", "common")] == []


def test_no_file_runs_code_that_came_with_data():
    unsafe = {str(file.relative_to(ROOT)): _unsafe(file.read_text(encoding="utf-8")) for file in _sources(ROOT)}
    assert {file: found for file, found in unsafe.items() if found} == {}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import pickle", ["imports pickle"]),
        ("from cloudpickle import dumps", ["imports cloudpickle"]),
        ("import torch\ntorch.load('x')", ["torch.load"]),
        ("from torch import load", ["torch.load"]),
        ("eval('1')", ["eval"]),
        ("exec('1')", ["exec"]),
        ("f(trust_remote_code=True)", ["trust_remote_code=True"]),
        ("np.load('x', allow_pickle=flag)", ["allow_pickle=flag"]),
        ("model.eval()\nf(trust_remote_code=False)", []),
    ],
)
def test_code_that_came_with_data_is_found(source, found):
    assert _unsafe(source) == found


def _features_among(loaded: Sequence[str]) -> list[str]:
    return [name for name in FEATURES if any(f"{module}.".startswith(f"{name}.") for module in loaded)]


def test_training_loads_no_feature_that_nobody_has_asked_for(fresh):
    ours = [name for name in FEATURES if name.split(".")[0] in MAY_IMPORT]
    modules = {name for package in MAY_IMPORT for name in house.modules_of(ROOT, package)}
    assert [name for name in ours if name not in modules] == []
    loaded = _features_among(fresh["training"])
    assert [name for name in loaded if name != "bitsandbytes"] == []  # which peft imports where it is installed
    assert "rollout.ray_pool" in _features_among(fresh["ray"])


def test_rewards_load_neither_torch_nor_ray():
    code = "import sys, pkgutil, importlib, rewards\n"
    code += "for module in pkgutil.walk_packages(rewards.__path__, 'rewards.'):\n"
    code += "    importlib.import_module(module.name)\n"
    code += "print(*{'torch', 'ray', 'transformers'} & set(sys.modules))"
    assert _python("-c", code).split() == []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Both distributions as a user gets them: wheels made from source distributions, then installed into a folder."""
    folder = tmp_path_factory.mktemp("wheel")
    for project in (ROOT / "rewards", ROOT):
        _python("-m", "build", "--no-isolation", "--outdir", str(folder), str(project))
    files = sorted(folder.glob("*.whl"))
    assert len(files) == len(list(folder.glob("*.tar.gz"))) == 2
    options = ["--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check"]
    _python("-m", "pip", "install", "--quiet", *options, "--target", str(folder / "site"), *map(str, files))
    return folder / "site"


@pytest.mark.slow
def test_the_wheels_hold_the_four_packages_and_nothing_else(wheel):
    shipped = {file.relative_to(wheel).as_posix() for file in wheel.rglob("*") if file.is_file()}
    written = {
        file.relative_to(ROOT).as_posix()
        for package in MAY_IMPORT
        for file in (ROOT / package).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    of_the_project = {f"rewards/{name}" for name in ("pyproject.toml", "README.md", "LICENSE")}
    commands = {"bin/quartet", "bin/quartet-reward"}
    assert {file for file in shipped if ".dist-info/" not in file} == (written - of_the_project) | commands
    assert {f"{package}/py.typed" for package in MAY_IMPORT} <= shipped


@pytest.mark.slow
def test_no_package_is_in_both_wheels_and_the_heavy_one_needs_the_light_one_of_its_version(wheel):
    def packages(distribution: str) -> set[str]:
        record = (wheel / f"{distribution}-{VERSION}.dist-info/RECORD").read_text().splitlines()
        return {line.partition("/")[0] for line in record if ".py," in line}

    assert packages("quartet_rewards") == {"rewards"}
    assert packages("quartet_rl") == set(MAY_IMPORT) - {"rewards"}
    needed = (wheel / f"quartet_rl-{VERSION}.dist-info/METADATA").read_text().splitlines()
    assert f"Requires-Dist: quartet-rewards=={VERSION}" in needed


@pytest.mark.slow
def test_the_wheel_imports_from_an_empty_folder(wheel, tmp_path):
    packages = ", ".join(MAY_IMPORT)
    code = f"import {packages}\nfor package in ({packages}):\n    print(package.__file__)"
    files = _python("-c", code, cwd=tmp_path, path=wheel).splitlines()
    assert [Path(file).parent for file in files] == [wheel / package for package in MAY_IMPORT]


@pytest.mark.slow
def test_the_wheel_runs_its_command_from_an_empty_folder(wheel, tmp_path):
    usage = _python("-m", "grpo", "--help", cwd=tmp_path, path=wheel)
    for command in ("sft", "train", "eval", "sample", "serve", "convert"):
        assert command in usage
    for command in ("quartet", "quartet-reward"):
        said = _python(str(wheel / "bin" / command), "--version", cwd=tmp_path, path=wheel)
        assert said == f"{command} {VERSION}\n"


@pytest.mark.slow
def test_the_public_names_of_the_wheel_are_there(wheel, tmp_path):
    code = f"import importlib\nfor package in {list(MAY_IMPORT)}:\n"
    code += "    module = importlib.import_module(package)\n"
    code += "    print(package, *[name for name in getattr(module, '__all__', ()) if hasattr(module, name)])"
    found = dict(line.partition(" ")[::2] for line in _python("-c", code, cwd=tmp_path, path=wheel).splitlines())
    for package in MAY_IMPORT:
        assert set(found[package].split()) == _public_names(package), package
    assert {"load_reward", "right_at"} <= _public_names("rewards")


def _public_names(package: str) -> set[str]:
    """`__all__` as it is written in the package."""
    for node in ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


@pytest.mark.parametrize("page", PAGES)
def test_a_generated_page_is_what_the_source_says(fresh, page):
    assert (ROOT / f"docs/{page}.md").read_text() == fresh[page], f"run `make reference` and commit docs/{page}.md"


def _from_ours(file: Path) -> list[tuple[str, str]]:
    """What a script takes from our packages: pairs of a module and a name."""
    nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in nodes if node.module and node.level == 0 and node.module.split(".")[0] in MAY_IMPORT]
    return [(node.module or "", alias.name) for node in ours for alias in node.names]


SCRIPTS = sorted(file for folder in ("benchmarks", "docs", "examples") for file in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_what_a_script_imports_from_the_packages_is_there(file):
    """Types are checked in the packages alone, and most benchmarks are run by hand."""
    for module, name in _from_ours(file):
        found = importlib.import_module(module)
        assert hasattr(found, name) or importlib.util.find_spec(f"{module}.{name}"), f"{module}.{name}"

"""The house of DESIGN.md stands: who imports whom, what is shipped, and what no file may contain."""

import ast
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "policies": set(),
    "rollout": {"policies"},
    "rewards": set(),
    "grpo": {"policies", "rollout", "rewards"},
}
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
    for package in MAY_IMPORT:
        (tmp_path / package).mkdir()
    (tmp_path / "policies/lora.py").write_text("def f():\n    from rollout.engine import Engine\n")
    (tmp_path / "rollout/pool.py").write_text("import torch, grpo.algorithm.losses\nfrom policies import lora\n")
    (tmp_path / "rewards/text.py").write_text("from . import length\nimport tests.conftest\n")
    (tmp_path / "grpo/train.py").write_text("import policies, rollout, rewards\n")
    assert _against_the_arrows(tmp_path) == [
        "policies/lora.py imports rollout",
        "rewards/text.py imports tests",
        "rollout/pool.py imports grpo",
    ]


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


def test_rewards_load_neither_torch_nor_ray():
    code = "import sys, pkgutil, importlib, rewards\n"
    code += "for module in pkgutil.walk_packages(rewards.__path__, 'rewards.'):\n"
    code += "    importlib.import_module(module.name)\n"
    code += "print(*{'torch', 'ray', 'transformers'} & set(sys.modules))"
    assert _python("-c", code).split() == []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The distribution as a user gets it: a wheel made from the source distribution, then installed into a folder."""
    folder = tmp_path_factory.mktemp("wheel")
    _python("-m", "build", "--no-isolation", "--outdir", str(folder))
    [file] = folder.glob("*.whl")
    assert len(list(folder.glob("*.tar.gz"))) == 1
    options = ["--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check"]
    _python("-m", "pip", "install", "--quiet", *options, "--target", str(folder / "site"), str(file))
    return folder / "site"


def test_the_wheel_holds_the_four_packages_and_nothing_else(wheel):
    shipped = {file.relative_to(wheel).as_posix() for file in wheel.rglob("*") if file.is_file()}
    written = {
        file.relative_to(ROOT).as_posix()
        for package in MAY_IMPORT
        for file in (ROOT / package).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert {file for file in shipped if ".dist-info/" not in file} == written | {"bin/quartet"}
    assert {f"{package}/py.typed" for package in MAY_IMPORT} <= shipped
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert listed == {"packages": list(MAY_IMPORT)}


def test_the_wheel_imports_from_an_empty_folder(wheel, tmp_path):
    packages = ", ".join(MAY_IMPORT)
    code = f"import {packages}\nfor package in ({packages}):\n    print(package.__file__)"
    files = _python("-c", code, cwd=tmp_path, path=wheel).splitlines()
    assert [Path(file).parent for file in files] == [wheel / package for package in MAY_IMPORT]


def test_the_wheel_runs_its_command_from_an_empty_folder(wheel, tmp_path):
    usage = _python("-m", "grpo", "--help", cwd=tmp_path, path=wheel)
    for command in ("sft", "train", "eval", "sample", "convert"):
        assert command in usage
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert _python(str(wheel / "bin/quartet"), "--version", cwd=tmp_path, path=wheel) == f"quartet {version}\n"


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


def test_the_reference_page_is_what_the_options_say():
    said = _python(str(ROOT / "docs/write_reference.py"), path=ROOT)
    assert (ROOT / "docs/reference.md").read_text() == said, "run `make reference` and commit docs/reference.md"

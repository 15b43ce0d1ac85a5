"""quartet-rewards in an environment that has what it asks for and nothing else, and the recipe of CI there."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "examples/11_rewards_in_ci"
PROJECT = tomllib.loads((ROOT / "rewards/pyproject.toml").read_text())["project"]
HEAVY = ("torch", "ray", "transformers", "trl", "peft", "datasets", "numpy")


def needed(requirements: list[str]) -> set[str]:
    """The distributions that these requirements bring, as they are installed here."""
    names: set[str] = set()
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        if requirement.name not in names and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            names.add(requirement.name)
            waiting += map(Requirement, importlib.metadata.requires(requirement.name) or [])
    return names


def link(names: set[str], site: Path) -> None:
    """Puts what is installed here under these names into another environment, without the commands."""
    for name in names:
        tops = {file.parts[0] for file in importlib.metadata.files(name) if file.parts[0] not in ("..", "__pycache__")}
        folder = Path(str(importlib.metadata.distribution(name).locate_file("")))
        for top in tops:
            if not (site / top).exists():
                (site / top).symlink_to(folder / top)


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """Variables by which `python` and `pip` are those of an environment with pip and what quartet-rewards needs, and
    the index is a folder with its wheel."""
    folder = tmp_path_factory.mktemp("environment")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder / "wheels")]
    subprocess.run([*build, str(ROOT / "rewards")], check=True, capture_output=True)
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    [site] = (folder / "venv").glob("lib/python*/site-packages")
    link(needed(["pip", *PROJECT["dependencies"], *PROJECT["optional-dependencies"]["pytest"]]), site)
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST", "PIP"))}
    of_pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder / "wheels"), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    return variables | of_pip | {"PATH": f"{folder / 'venv/bin'}:{os.environ['PATH']}"}


def run(line: str, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    shell = ["bash", "-eo", "pipefail", "-c", line]  # as GitHub runs it
    return subprocess.run(shell, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_recipe_of_ci_passes_and_fails_with_a_reward_that_is_hacked(environment, tmp_path):
    folder = tmp_path / "repository"
    shutil.copytree(RECIPE, folder)
    [job] = yaml.safe_load((RECIPE / "rewards.yml").read_text())["jobs"].values()
    lines = [step["run"] for step in job["steps"] if "run" in step]
    assert len(lines) == 3
    for line in lines:
        done = run(line, folder, environment)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    assert 'tests="2"' in (folder / "rewards.xml").read_text()
    file = folder / "my_rewards.py"
    file.write_text(file.read_text().replace(" and said(text) == said(gold)", ""))
    test, fixture = (run(line, folder, environment) for line in lines[1:])
    assert (test.returncode, fixture.returncode) == (1, 1)
    assert "problem: gold, last digit raised: 12 of 12 get full marks" in test.stdout
    assert "FAILED test_rewards.py::test_exact" in fixture.stdout
    assert "test_brief" not in fixture.stdout


@pytest.mark.slow
def test_no_module_is_loaded_that_it_has_not_asked_for(environment, tmp_path):
    done = run("python -m pip install quartet-rewards && python -m pip list --format json", tmp_path, environment)
    assert done.returncode == 0, done.stderr
    names = {row["name"].lower().replace("_", "-") for row in json.loads(done.stdout.splitlines()[-1])}
    assert names.isdisjoint(HEAVY)
    done = run("python -X importtime -m rewards test gsm8k --data.limit 3", tmp_path, environment)
    assert done.returncode == 0, done.stderr
    loaded = {
        name.partition(".")[0] for name in re.findall(r"^import time: .*\| +([\w.]+)$", done.stderr, re.MULTILINE)
    }
    assert {"rewards", "pydantic", "rich", "yaml"} <= loaded
    assert loaded.isdisjoint(HEAVY)
    done = run("quartet-reward test gsm8k --data.name owner/problems", tmp_path, environment)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "needs the package datasets: pip install 'quartet-rewards[datasets]', or give a file of JSON" in done.stderr

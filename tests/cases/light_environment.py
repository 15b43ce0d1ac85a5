"""An environment of Python that has what a distribution asks for and nothing else, without a network."""

import importlib.metadata
import os
import subprocess
import sys
import tomllib
import venv
from collections.abc import Sequence
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "ray", "transformers", "trl", "peft", "datasets", "numpy")


def needed(requirements: Sequence[str]) -> set[str]:
    """The distributions of others that these requirements bring, as they are installed here."""
    names: set[str] = set()
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        if requirement.name.startswith("quartet-") or requirement.name in names:
            continue
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
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


def light_environment(folder: Path, projects: Sequence[str], extra: str = "") -> dict[str, str]:
    """Variables by which `python` and `pip` are those of an environment with pip and what the projects need, and the
    index is a folder with their wheels. `extra`: what that of the last project brings is there, too."""
    requirements = ["pip"]
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder / "wheels")]
    for name in projects:
        project = tomllib.loads((ROOT / name / "pyproject.toml").read_text())["project"]
        requirements += project["dependencies"]
        subprocess.run([*build, str(ROOT / name)], check=True, capture_output=True)
    requirements += project["optional-dependencies"][extra] if extra else []
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    [site] = (folder / "venv").glob("lib/python*/site-packages")
    link(needed(requirements), site)
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST", "PIP"))}
    of_pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder / "wheels"), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    return variables | of_pip | {"PATH": f"{folder / 'venv/bin'}:{os.environ['PATH']}"}


def run(line: str, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    shell = ["bash", "-eo", "pipefail", "-c", line]  # as GitHub runs it
    return subprocess.run(shell, cwd=folder, env=environment, capture_output=True, text=True, check=False)

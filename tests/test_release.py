"""What a release says of itself is the same everywhere."""

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]


def project(folder: str) -> dict:
    return tomllib.loads((ROOT / folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_every_file_names_one_version_and_the_day_of_its_release():
    [(version, day), *_] = re.findall(r"^## \[(\d\S+)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert project(".")["version"] == project("rewards")["version"] == citation["version"] == version
    assert str(citation["date-released"]) == day
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()  # what the format asks for
    assert citation["license"] == project(".")["license"]


def test_the_changelog_says_how_to_upgrade():
    said = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = said.partition("## [Unreleased]")[2].partition("## [0.1.0]")[0]
    assert "### Upgrading from 0.1" in newest

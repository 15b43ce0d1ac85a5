"""Every figure of a page has its JSON, every JSON has a page, and what a page says to run is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results"
FINDINGS = ROOT / "docs/findings.md"  # it names what is in the history
PAGES = [
    ROOT / "README.md",
    ROOT / "benchmarks/RESULTS.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
]


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_results_that_a_page_names_exist(page):
    """`results/balance.json`, `benchmarks/results/balance.json`, `results/balance.png` and the like."""
    names = set(re.findall(r"\bresults/([\w-]+\.\w+)", text_of(page)))
    assert sorted(name for name in names if not (RESULTS / name).exists()) == []


def test_every_result_is_named_by_a_page():
    names = {name for page in PAGES for name in re.findall(r"[\w-]+\.(?:json|png)\b", text_of(page))}
    assert sorted(file.name for file in RESULTS.iterdir() if file.name not in names) == []


@pytest.mark.parametrize("page", [page for page in PAGES if page != FINDINGS], ids=name_of)
def test_the_benchmarks_that_a_page_runs_exist(page):
    """`python benchmarks/rollout.py` and `python -m benchmarks.chaos`. The findings may run what is gone."""
    text = text_of(page)
    files = {ROOT / name for name in re.findall(r"\bpython (benchmarks/[\w/]+\.py)", text)}
    modules = [ROOT / name.replace(".", "/") for name in re.findall(r"\bpython -m (benchmarks(?:\.\w+)+)", text)]
    files |= {module / "__main__.py" if module.is_dir() else module.with_suffix(".py") for module in modules}
    assert sorted(name_of(file) for file in files if not file.exists()) == []

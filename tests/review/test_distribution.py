"""quartet-review in an environment that has what it asks for and nothing else, on a run that was copied there."""

import json
import re
import shutil

import pytest
from light_environment import HEAVY, ROOT, light_environment, run

CASE = ROOT / "tests/cases/run_to_view"
INSTALL = "python -m pip install quartet-review && python -m pip list --format json"


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """One without the extra `view`, where quartet-review is installed."""
    folder = tmp_path_factory.mktemp("environment")
    environment = light_environment(folder, ["rewards", "review"])
    done = run(INSTALL, folder, environment)
    assert done.returncode == 0, done.stderr
    names = {row["name"].lower().replace("_", "-") for row in json.loads(done.stdout.splitlines()[-1])}
    assert {"quartet-review", "quartet-rewards"} <= names
    assert names.isdisjoint(HEAVY)
    return environment


@pytest.mark.slow
def test_a_copied_run_is_diagnosed_and_compared(environment, tmp_path):
    for seed in (0, 1):
        shutil.copytree(CASE, tmp_path / f"seed{seed}")
        file = tmp_path / f"seed{seed}/config.yaml"
        file.write_text(file.read_text().replace("\nseed: 0\n", f"\nseed: {seed}\n"))
    done = run("python -X importtime -m review diagnose seed0", tmp_path, environment)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "Nothing was found."), done.stderr
    loaded = {
        name.partition(".")[0] for name in re.findall(r"^import time: .*\| +([\w.]+)$", done.stderr, re.MULTILINE)
    }
    assert {"review", "rewards", "rich"} <= loaded
    assert loaded.isdisjoint(HEAVY)
    done = run("quartet-review compare seed0 seed1 --metrics reward/mean", tmp_path, environment)
    assert done.returncode == 0, done.stderr
    assert "A (n = 2)" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("command", ["view", "report"])
def test_a_missing_extra_is_named_before_the_run_is_read(environment, command, tmp_path):
    shutil.copytree(CASE, tmp_path / "run")
    done = run(f"quartet-review {command} run", tmp_path, environment)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "tokenizers: pip install 'quartet-review[view]'" in done.stderr
    assert not (tmp_path / "run/report.html").exists()


@pytest.mark.slow
def test_the_extra_is_enough_for_the_report(tmp_path):
    pytest.importorskip("plotly", reason="needs the extra view")
    environment = light_environment(tmp_path / "environment", ["rewards", "review"], "view")
    shutil.copytree(CASE, tmp_path / "run")
    done = run("python -m pip install quartet-review && quartet-review report run", tmp_path, environment)
    assert done.returncode == 0, done.stderr
    assert "David" in (tmp_path / "run/report.html").read_text(encoding="utf-8")

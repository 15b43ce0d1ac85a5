"""quartet-rewards in an environment that has what it asks for and nothing else, and the recipe of CI there."""

import json
import re
import shutil

import pytest
import yaml
from light_environment import HEAVY, ROOT, light_environment, run

RECIPE = ROOT / "examples/11_rewards_in_ci"


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    return light_environment(tmp_path_factory.mktemp("environment"), ["rewards"], "pytest")


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
    assert "gold, last digit raised" in test.stdout
    assert "2 errors" in test.stdout
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

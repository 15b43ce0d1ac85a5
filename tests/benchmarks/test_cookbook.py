"""What `make tinker` gives a recipe of the Tinker cookbook, here one that only writes its metrics."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import datasets
import pytest

from benchmarks import cookbook


@pytest.fixture
def configs(monkeypatch, tmp_path):
    """The Configs that recipes were started with."""
    found = []

    def main(config):
        found.append(config)
        folder = Path(config.log_path)
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text(json.dumps({"train_mean_nll": 1.5, "reward/total": 0.25}))

    package, info = ModuleType("tinker_cookbook"), ModuleType("tinker_cookbook.model_info")
    package.model_info = info
    modules = {"tinker_cookbook": package, "tinker_cookbook.model_info": info}
    for name in ("sl_loop", "rl_loop"):
        module = ModuleType(name)
        module.main, module.Config = main, SimpleNamespace
        modules[f"tinker_cookbook.recipes.{name}"] = module
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(datasets, "load_dataset", datasets.load_dataset)  # which the script replaces
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TINKER_BASE_URL", "http://127.0.0.1:8000")
    monkeypatch.setenv("TINKER_API_KEY", "tml-here")
    return found


def start(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["cookbook", *words])
    cookbook.main()


def test_each_recipe_has_a_new_folder_and_prints_its_own_metric(monkeypatch, configs, capsys):
    """In the folder of a former run a recipe resumes, and one that had ended makes no step."""
    for recipe, line in (("rl_loop", "reward/total: 0.250"), ("sl_loop", "train_mean_nll: 1.500")):
        start(monkeypatch, recipe, "--model", "here", "--steps", "5", "batch_size=8")
        assert line in capsys.readouterr().err
    assert len({config.log_path for config in configs}) == 2
    assert [(config.max_steps, config.batch_size) for config in configs] == [(5, 8)] * 2
    start(monkeypatch, "sl_loop", "--model", "here", "--folder", "named")
    assert configs[-1].log_path == "named"


@pytest.mark.parametrize("name", ["TINKER_BASE_URL", "TINKER_API_KEY"])
def test_without_a_server_nothing_is_sent(monkeypatch, configs, capsys, name):
    """Without an address the SDK would ask Tinker itself."""
    monkeypatch.delenv(name)
    with pytest.raises(SystemExit):
        start(monkeypatch, "sl_loop", "--model", "here")
    assert f"{name} is not set; `quartet serve --train FOLDER` prints it" in capsys.readouterr().err
    assert configs == []

"""Scripts of benchmarks start, and those that also check something run in small. A nightly run does this."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import same_bits

ROOT = Path(__file__).parents[2]
PLACES = [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "benchmarks").glob("*/__main__.py")]
SCRIPTS = sorted(file for file in PLACES if "ArgumentParser" in file.read_text(encoding="utf-8"))


def run(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.long
def test_every_script_has_a_help():
    for script in SCRIPTS:
        module = ".".join(script.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
        assert "usage:" in run("-m", module, "--help"), script


@pytest.mark.long
@pytest.mark.parametrize("seed", [0, 1, 2])  # one of each kind of run
def test_a_run_that_is_struck_ends_like_one_that_is_not(tmp_path, seed):
    words = ["-m", "benchmarks.chaos", "--faults", "3", "--runs", "1", "--first", str(seed), "--steps", "12"]
    run(*words, "--folder", str(tmp_path), "--json", str(tmp_path / "chaos.json"))
    [struck] = json.loads((tmp_path / "chaos.json").read_text())["runs"]
    assert (struck["equal"], struck["left"], len(struck["strikes"])) == (True, [], 3)


@pytest.mark.long
def test_the_small_form_of_make_gpu_runs_every_piece(tmp_path):
    run("benchmarks/gpu.py", "--cpu", "--minutes", "30", "--json", str(tmp_path / "gpu.json"))
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["pieces"]["tests"]["result"]["skipped"] == {}
    assert all("result" in piece for piece in report["pieces"].values())


@pytest.mark.long
def test_same_bits_names_what_differs(tmp_path):
    for name, weight in (("a", 0.1), ("b", 0.1), ("c", 0.1 + 1e-8)):
        (tmp_path / name).mkdir()
        save_file({"w": torch.tensor([weight, float("nan")])}, tmp_path / name / "policy.safetensors")
        line = {"step": 1, "reward/mean": 0.5, "time/step": 1e9 * weight}
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert same_bits.differences(tmp_path / "a", tmp_path / "b") == (2, [])
    _, problems = same_bits.differences(tmp_path / "a", tmp_path / "c")
    assert problems == ["policy.safetensors: w differs by up to 7.45e-09"]

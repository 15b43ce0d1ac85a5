"""benchmarks/same_bits.py notices a bit, a token, a name and a file that differ, and nothing else."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import zstandard
from safetensors.torch import save_file

SCRIPT = Path(__file__).parents[2] / "benchmarks/same_bits.py"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("same_bits", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_folder(folder: Path, *, weight=0.1, token=7, metric="reward/mean", version=3) -> Path:
    (folder / "checkpoints/step_000001").mkdir(parents=True)
    tensors = {"trunk.w": torch.tensor([weight, float("nan")]), "steps": torch.tensor(2.0)}
    save_file(tensors, folder / "checkpoints/step_000001/policy.safetensors")
    (folder / "checkpoints/step_000001/state.json").write_text(json.dumps({"state": {"version": version}}))
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, metric: 0.5, "time/step": weight}) + "\n")
    rollout = {"token_ids": [1, token], "logprobs": [-0.5, -0.25]}
    (folder / "rollouts").mkdir()
    (folder / "rollouts/step_000001.jsonl.zst").write_bytes(zstandard.compress(json.dumps(rollout).encode() + b"\n"))
    return folder


def test_the_same_run_has_the_same_bits_whatever_it_took(script, tmp_path):
    a, b = run_folder(tmp_path / "a"), run_folder(tmp_path / "b")
    (b / "metrics.jsonl").write_text(json.dumps({"step": 1, "reward/mean": 0.5, "time/step": 9.0}) + "\n")
    assert script.differences(a, b) == (4, [])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"weight": 0.1 + 1e-8}, "checkpoints/step_000001/policy.safetensors: trunk.w differs by up to 7.45e-09"),
        ({"token": 8}, "rollouts/step_000001.jsonl.zst[0].token_ids[1]: 7 -> 8"),
        ({"version": 4}, "checkpoints/step_000001/state.json.state.version: 3 -> 4"),
    ],
)
def test_what_differs_is_named(script, tmp_path, change, problem):
    _, problems = script.differences(run_folder(tmp_path / "a"), run_folder(tmp_path / "b", **change))
    assert problems == [problem]


def test_a_file_or_a_name_that_is_missing_is_named_and_another_name_is_looked_up(script, tmp_path):
    a, b = run_folder(tmp_path / "a"), run_folder(tmp_path / "b", metric="reward/average")
    _, problems = script.differences(a, b)
    assert sorted(problems) == ["metrics.jsonl[0].reward/average is new", "metrics.jsonl[0].reward/mean is gone"]
    script.RENAMED.append(("^reward/mean$", "reward/average"))
    assert script.differences(a, b)[1] == []
    (b / "rollouts/step_000001.jsonl.zst").unlink()
    assert script.differences(a, b)[1] == ["rollouts/step_000001.jsonl.zst is gone"]

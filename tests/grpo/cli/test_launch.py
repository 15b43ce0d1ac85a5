"""Ray Train starts the ranks of a learner by one command, and the user's Ctrl-C reaches them."""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors.torch import load_file

from grpo.cli.launch import launch
from grpo.run import checkpoint
from review.readers.run_folder import read_metrics
from rollout.workers.cluster import Seclusion


@pytest.fixture(scope="module")
def words(run_words):
    """`words(folder, **options)`: a small run with two learner ranks."""
    return lambda folder, **given: [sys.executable, *run_words(folder, **{"learner.workers": 2} | given)]


def _weights(folder: Path) -> dict:
    return load_file(folder / "policy/model.safetensors")


def _run(command: list[str], **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=280
    )


ENDLESS = {"steps": 100000, "checkpoint.every": 100000}


def _begun(command: list[str], folder: Path, **environment: str) -> subprocess.Popen:
    """A run that has taken a step."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, env=os.environ | environment, **pipes)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not ((folder / "metrics.jsonl").exists() and read_metrics(folder)):
        time.sleep(0.2)
    return process


def _interrupted(process: subprocess.Popen) -> str:
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 130, said
    return said


@pytest.fixture
def two_nodes(monkeypatch):
    """The address of a simulated cluster that asks for a token, with four processors on each node."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    Seclusion._tell_ray()
    settings = {"worker_niceness": 0}  # as in a cluster of our own
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "_system_config": settings})
    nodes.add_node(num_cpus=4)
    yield nodes.address
    nodes.shutdown()
    monkeypatch.undo()
    Seclusion._tell_ray()


@pytest.mark.long
def test_four_samplers_on_two_nodes_and_learners_on_one_say_where_they_are_and_end_with_ctrl_c(
    words, tmp_path, two_nodes
):
    folder = tmp_path / "run"
    process = _begun(words(folder, **ENDLESS, **{"rollout.workers": 4}), folder, RAY_ADDRESS=two_nodes)
    said = _interrupted(process)
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    learners, workers = ([event for event in events if event["event"] == kind] for kind in ("learner", "worker"))
    assert [event["rank"] for event in learners] == [0, 1]
    assert len({event["node"] for event in learners}) == 1
    assert sorted(event["worker"] for event in workers) == [0, 1, 2, 3]
    assert len({event["node"] for event in workers}) == 2
    for event in (*learners, *workers):
        assert event["threads"] == 1
        assert f"node={event['node']} process={event['process']}" in said
    left = [psutil.Process(e["process"]) for e in (*learners, *workers) if psutil.pid_exists(e["process"])]
    assert psutil.wait_procs(left, timeout=30)[1] == []


@pytest.mark.long
def test_two_ranks_and_two_samplers_on_two_nodes_learn_as_one_process(words, tmp_path, two_nodes):
    """The whole run is one command."""
    given = {"rollout.workers": 2}
    done = _run(words(tmp_path / "many", **given), RAY_ADDRESS=two_nodes)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "learning in 2 processes on cpu" in done.stdout + done.stderr
    alone = _run(words(tmp_path / "one", **{"learner.workers": 0}))
    assert alone.returncode == 0, alone.stderr
    one, many = _weights(tmp_path / "one"), _weights(tmp_path / "many")
    assert one.keys() == many.keys()
    for name, tensor in one.items():
        assert (tensor - many[name]).abs().max() <= 1e-4, name


@pytest.mark.slow
def test_ray_train_is_asked_for_a_gpu_for_each_rank(monkeypatch, micro_config, tmp_path):
    """Without a GPU: only what Ray Train is told."""
    import ray.train.torch

    asked, backends = {}, []

    class Trainer:
        def __init__(self, _, scaling_config, torch_config, **more):
            asked.update(scaling_config.resources_per_worker)
            backends.append((torch_config.backend, scaling_config.use_gpu))

        def fit(self):
            return SimpleNamespace(return_value=None)

    monkeypatch.setattr(ray.train.torch, "TorchTrainer", Trainer)
    monkeypatch.setattr("rollout.workers.cluster.start_ray", lambda *_: None)
    monkeypatch.setattr("grpo.cli.launch.device_of", lambda _: torch.device("cuda"))
    given = {"learner.workers": 2, "rollout.workers": 2, "threads": 3}
    launch(micro_config(tmp_path / "r", **given))
    assert asked == {"CPU": 3, "GPU": 1}
    for device in ("xpu", "cpu"):
        monkeypatch.setattr("grpo.cli.launch.device_of", lambda _, device=device: torch.device(device))
        launch(micro_config(tmp_path / "r", **given))
    assert backends == [("nccl", True), ("xccl", True), ("gloo", False)]
    assert asked == {"CPU": 3, "GPU": 0}


@pytest.mark.long
@pytest.mark.slow
def test_ctrl_c_saves_and_leaves_no_process(words, tmp_path):
    folder = tmp_path / "run"
    process = _begun(words(folder, **ENDLESS), folder)
    below = psutil.Process(process.pid).children(recursive=True)
    said = _interrupted(process)
    [step] = checkpoint.saved(folder / "checkpoints")
    assert f"stopped after step {step}; go on with --resume auto" in said
    assert not [child for child in psutil.wait_procs(below, timeout=10)[1] if child.is_running()]
    assert not (folder / ".stop").exists()
    # The same run goes on in one process.
    on = _run([*words(folder, **{"learner.workers": 0, "steps": step + 1}), "--resume", "auto", "--force"])
    assert on.returncode == 0, on.stderr
    assert [line["step"] for line in read_metrics(folder)] == list(range(1, step + 2))


@pytest.mark.long
def test_a_reward_that_fails_ends_the_run_with_its_message(words, tmp_path):
    own = tmp_path / "own.py"
    own.write_text(
        "def fails(completions, **_):\n"
        "    if not all('####' in completion for completion in completions):  # a gold solution passes\n"
        "        raise ValueError('this reward is broken')\n"
        "    return [1.0] * len(completions)\n"
    )
    done = _run(words(tmp_path / "run", rewards=f"[{{function: '{own}:fails'}}]"))
    assert done.returncode == 1
    assert "quartet: " in done.stderr
    assert "this reward is broken" in done.stderr.split("quartet: ")[-1]

"""OpenMP beside other work: how threads wait, how many there are, and that a run keeps their number."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

import grpo.run.hardware
from grpo.run.hardware import threads_for
from grpo.source.policy_source import load_policy, read_shape, with_threads
from grpo.train import train
from policies.openmp import CHOICES, WAITING, wait_briefly, waiting_variables
from rewards.config.options import dump_yaml

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def two_cores(monkeypatch) -> Iterator[None]:
    """A machine of two cores whose user has set nothing."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(grpo.run.hardware, "_cores", lambda: 2)
    yield
    torch.set_num_threads(1)


def test_the_command_has_a_bounded_spin_before_torch_is_loaded(tmp_path):
    """What OpenMP goes by in a fresh interpreter."""
    command = [sys.executable, "-m", "grpo", "train", "--output_dir", str(tmp_path), "--print_config"]
    kept = {name: value for name, value in os.environ.items() if name not in CHOICES}
    environment = kept | {"OMP_DISPLAY_ENV": "verbose", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("this torch comes with another OpenMP runtime than libgomp")
    assert f"GOMP_SPINCOUNT = '{WAITING['GOMP_SPINCOUNT']}'" in done.stderr


def test_what_the_user_chose_stays_and_so_does_what_a_program_that_has_loaded_torch_has(monkeypatch):
    for name in CHOICES:
        monkeypatch.delenv(name, raising=False)
    assert waiting_variables() == WAITING
    wait_briefly()
    assert not set(CHOICES) & os.environ.keys()
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert waiting_variables() == {}


def test_the_number_follows_from_the_size_alone(monkeypatch):
    assert [threads_for(size) for size in (1_000, 2_800_000, 15_999_999, 16_000_000, 135_000_000)] == [1, 1, 1, 2, 2]
    monkeypatch.setattr(grpo.run.hardware, "_cores", lambda: 64)
    assert [threads_for(size) for size in (2_800_000, 135_000_000, 10**12)] == [1, 16, 64]


def test_omp_num_threads_is_the_users_choice(monkeypatch):
    for said, threads in {"3": 3, "5,2": 5, " 4 ": 4, "": 1, "0": 1, "many": 1}.items():
        monkeypatch.setenv("OMP_NUM_THREADS", said)
        assert threads_for(2_800_000) == threads


def test_a_policy_alone_is_given_its_threads_too(micro_config, tmp_path, monkeypatch):
    """As in `quartet eval` and `quartet sample`, which have no run folder."""
    config = micro_config(tmp_path, threads=None)
    torch.set_num_threads(2)
    load_policy(config, ["3 + 4 = 7\n"])
    assert torch.get_num_threads() == 1
    monkeypatch.setattr(grpo.run.hardware, "PARAMETERS_PER_THREAD", 1_000)
    load_policy(config, ["3 + 4 = 7\n"])
    assert torch.get_num_threads() == 2


def _started(config, **flags):
    """The configuration of a run that was opened and has made no step."""
    with pytest.MonkeyPatch.context() as patch:
        opened = []
        patch.setattr("grpo.steps.supervise.first_policy", lambda run, *_: opened.append(run.config) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(config, **flags)
    return opened[0]


def test_contract_9_a_run_writes_its_threads_down_and_keeps_them(micro_config, tmp_path, monkeypatch):
    config = micro_config(tmp_path / "run", threads=None)
    with monkeypatch.context() as small:
        small.setattr(grpo.run.hardware, "PARAMETERS_PER_THREAD", 1_000)
        _started(config)
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["threads"] == 2
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert (_started(config, resume="auto").threads, torch.get_num_threads()) == (2, 2)
    assert "config_changed" not in (tmp_path / "run/events.jsonl").read_text()
    elsewhere, shape = micro_config(tmp_path / "other", threads=None), read_shape(config)[0]
    assert with_threads(elsewhere, str(tmp_path / "run/checkpoints/step_000001"), shape).threads == 2
    assert with_threads(elsewhere, "auto", shape).threads == 1
    assert with_threads(config.model_copy(update={"threads": 1}), "auto", shape).threads == 1  # who names one gets it


def test_contract_9_a_run_that_had_all_cores_goes_on_with_them(micro_config, tmp_path):
    """Its config.yaml was written when null meant that."""
    config = micro_config(tmp_path, threads=None)
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    shape = read_shape(config)[0]
    assert with_threads(config, "auto", shape).threads == 2
    assert with_threads(config, None, shape).threads == 1

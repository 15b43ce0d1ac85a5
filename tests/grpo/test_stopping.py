"""SIGTERM: the work in progress is given up at the next micro-batch, a step boundary is saved, and the run resumes."""

import os
import signal
import subprocess
import sys

import pytest

from grpo import checkpoint
from grpo.learner import Learner
from grpo.run_log import read_metrics, read_rollouts
from grpo.stopping import GivenUp, Stopped, StopSignal
from grpo.train import Trainer
from rollout.engine import Engine

SMALL = {"data.limit": 10, "learner.tokens_per_micro_batch": 64, "checkpoint.every": 100, "eval.limit": 3}


def _terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _at_call(monkeypatch, owner, name: str, number: int) -> list[int]:
    """SIGTERM arrives when `owner.name` is called for the number-th time; returns a list that grows with the calls."""
    real, calls = getattr(owner, name), []

    def called(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            _terminate()
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, called)
    return calls


def _untimed(folder) -> list[dict]:
    return [
        {k: v for k, v in line.items() if not k.startswith(("time/", "speed/", "memory/"))}
        for line in read_metrics(folder)
    ]


def _weights(folder, step: int) -> dict:
    saved = checkpoint.load(folder / f"checkpoints/step_{step:06d}")
    return {f"{file}/{name}": t for file, mapping in saved.tensors.items() for name, t in mapping.items()}


@pytest.fixture(scope="module")
def whole(micro_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    Trainer(micro_config(folder, **SMALL)).run()
    return folder


def _resumes_to_the_same(micro_config, folder, whole, **given) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    Trainer(micro_config(folder, **SMALL | given), resume="auto").run()
    assert signal.getsignal(signal.SIGTERM) == handler
    assert _untimed(folder) == _untimed(whole)
    for step in (1, 2, 3):
        assert read_rollouts(folder, step) == read_rollouts(whole, step)
    first, second = _weights(folder, 3), _weights(whole, 3)
    assert first.keys() == second.keys()
    assert [name for name in first if not first[name].equal(second[name])] == []


@pytest.mark.parametrize(
    ("owner", "name", "call", "saved", "message"),
    [
        # Warm start: three steps of one micro-batch or more, each behind one call of _update.
        (Learner, "sft_step", 2, None, "stopped after step 2 of the warm start; go on"),
        (Engine, "sample", 1, None, "stopped before step 1; go on"),  # in the evaluation before GRPO
        (Learner, "prepare", 1, None, "stopped before step 1; go on"),
        (Learner, "prepare", 2, 1, "stopped after step 1; go on"),
        (Learner, "weights", 3, 2, "stopped after step 2; go on"),  # published behind the second update
    ],
)
def test_contract_9_a_signal_at_any_time_leaves_a_step_boundary(
    micro_config, whole, tmp_path, monkeypatch, owner, name, call, saved, message
):
    folder, handler = tmp_path / "run", signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        _at_call(patch, owner, name, call)
        with pytest.raises(Stopped, match=message):
            Trainer(micro_config(folder, **SMALL)).run()
    assert signal.getsignal(signal.SIGTERM) == handler
    assert list(checkpoint.saved(folder / "checkpoints")) == ([saved] if saved else [])
    _resumes_to_the_same(micro_config, folder, whole)


def test_contract_9_the_step_in_progress_is_given_up_between_two_micro_batches(
    micro_config, whole, tmp_path, monkeypatch
):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        updates: list[int] = []
        update = Learner._update
        patch.setattr(Learner, "_update", lambda self, step: (updates.append(step), update(self, step))[1])
        losses = _at_call(patch, Learner, "_policy_loss", 10**9)
        step = Learner.step

        def second_step(self, batch, number, *rest):
            if number == 2:
                losses.clear()
                _at_call(patch, Learner, "_backward", 2)
            return step(self, batch, number, *rest)

        patch.setattr(Learner, "step", second_step)
        with pytest.raises(Stopped, match="stopped after step 1"):
            Trainer(micro_config(folder, **SMALL)).run()
    assert len(losses) == 2 < len(read_rollouts(folder, 2)) / 4, "two micro-batches of step 2, and no more"
    assert updates == [1, 2, 3, 1]  # those of the warm start, and step 1
    assert list(checkpoint.saved(folder / "checkpoints")) == [1]
    _resumes_to_the_same(micro_config, folder, whole)


def test_a_step_whose_first_update_is_made_is_finished(micro_config, tmp_path, monkeypatch):
    given = {"learner.updates_per_batch": 2}
    with monkeypatch.context() as patch:
        _at_call(patch, Learner, "_update", 3 + 1)  # the first update of step 1
        with pytest.raises(Stopped, match="stopped after step 1"):
            Trainer(micro_config(tmp_path / "a", **SMALL | given)).run()
    assert read_metrics(tmp_path / "a")[-1]["learner/updates"] == 2
    Trainer(micro_config(tmp_path / "b", steps=1, **SMALL | given)).run()
    first, second = _weights(tmp_path / "a", 1), _weights(tmp_path / "b", 1)
    assert all(first[name].equal(tensor) for name, tensor in second.items())


def test_contract_9_an_evaluation_that_was_given_up_is_made_when_the_run_goes_on(micro_config, tmp_path, monkeypatch):
    given = {"eval.every": 2, "steps": 3}
    Trainer(micro_config(tmp_path / "whole", **SMALL | given)).run()
    folder, record = tmp_path / "run", Trainer._evaluate

    def interrupted(self, pool, prompts, sampling, step):
        if step == 2:
            _terminate()
        return record(self, pool, prompts, sampling, step)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_evaluate", interrupted)
        with pytest.raises(Stopped, match="stopped after step 2"):
            Trainer(micro_config(folder, **SMALL | given)).run()
    assert "eval/accuracy" not in read_metrics(folder)[2]
    _resumes_to_the_same(micro_config, folder, tmp_path / "whole", **given)


def test_a_stop_in_the_last_evaluation_loses_nothing(micro_config, whole, tmp_path, monkeypatch):
    folder, record = tmp_path / "run", Trainer._evaluate

    def interrupted(self, pool, prompts, sampling, step):
        if step == 3:
            _terminate()
        return record(self, pool, prompts, sampling, step)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_evaluate", interrupted)
        with pytest.raises(Stopped, match="stopped after step 3"):
            Trainer(micro_config(folder, **SMALL)).run()
    assert not (folder / "policy").exists()
    _resumes_to_the_same(micro_config, folder, whole)
    assert (folder / "policy").exists()


def test_the_second_signal_ends_the_process_at_once():
    code = "import os, signal, time\nfrom grpo.stopping import StopSignal\nwith StopSignal() as stop:\n"
    code += "    os.kill(os.getpid(), signal.SIGTERM)\n    assert stop.asked\n    print('once', flush=True)\n"
    code += "    os.kill(os.getpid(), signal.SIGTERM)\n    time.sleep(60)\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "once\n")


def test_check_raises_once_it_was_asked_for_and_the_former_handler_comes_back():
    handler = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        stop.check()
        _terminate()
        with pytest.raises(GivenUp):
            stop.check()
        stop.listen()  # not again: a second signal must end the process
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) == handler

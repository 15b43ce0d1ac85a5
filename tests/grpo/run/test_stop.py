"""Signals and failures: the last whole step is saved, and the run resumes to the same bits."""

import errno
import json
import os
import pickle
import pty
import signal
import subprocess
import sys

import pytest
import ray
from copies import Copy

from grpo.evaluation.held_out import HeldOut
from grpo.learner.learner import Learner
from grpo.learner.terms.policy import PolicyTerm
from grpo.learner.update import NonFiniteStep, Update
from grpo.run import checkpoint, log
from grpo.run.log import RunLog
from grpo.run.stop import Stopped, signals
from grpo.steps import supervise
from grpo.task.task import Task
from grpo.train import train
from policies import tensor_files
from review.readers.run_folder import read_metrics
from rewards.group_score import RewardFailed, RewardFailure
from rewards.records import read_rollouts
from rollout.decoding.engine import Engine
from rollout.faults import RolloutError
from rollout.workers.local_pool import LocalPool

SLOW = [pytest.mark.slow, pytest.mark.long]
SMALL = {"data.limit": 10, "learner.tokens_per_micro_batch": 64, "checkpoint.every": 100}
SMALL |= {"eval.limit": 1, "eval.every": 2, "rollout.max_completion_tokens": 6}


def _terminate(kind: signal.Signals = signal.SIGTERM) -> None:
    signal.raise_signal(kind)


def _at_call(monkeypatch, owner, name: str, number: int, kind: signal.Signals = signal.SIGTERM) -> list[int]:
    """A signal arrives when `owner.name` is called for the number-th time; returns a list that grows with the calls."""
    real, calls = getattr(owner, name), []

    def called(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            _terminate(kind)
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, called)
    return calls


# A publication that is cut short or fails has no canaries in the line of its step.
UNCOMPARED = ("time/", "speed/", "memory/", "run/", "sync_check/")


def _untimed(folder) -> list[dict]:
    return [{k: v for k, v in line.items() if not k.startswith(UNCOMPARED)} for line in read_metrics(folder)]


def _weights(folder, step: int) -> dict:
    saved = checkpoint.load(folder / f"checkpoints/step_{step:06d}")
    return {f"{file}/{name}": t for file, mapping in saved.tensors.items() for name, t in mapping.items()}


@pytest.fixture(scope="module")
def whole(micro_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(micro_config(folder, **SMALL))
    return folder


def _resumes_to_the_same(micro_config, folder, whole, **given) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    train(micro_config(folder, **SMALL | given), resume="auto")
    assert signal.getsignal(signal.SIGTERM) == handler
    assert _untimed(folder) == _untimed(whole)
    for step in (1, 2, 3):
        assert read_rollouts(folder, step) == read_rollouts(whole, step)
    first, second = _weights(folder, 3), _weights(whole, 3)
    assert first.keys() == second.keys()
    assert [name for name in first if not first[name].equal(second[name])] == []


def _marked(marks, *rows):
    return [pytest.param(*row, marks=marks) for row in rows]


@pytest.mark.parametrize(
    ("kind", "owner", "name", "call", "saved", "message"),
    [
        (signal.SIGINT, Learner, "weights", 3, 2, "after step 2"),  # published after the second update
        *_marked(
            pytest.mark.slow,
            (signal.SIGHUP, supervise, "run_sft_stage", 1, None, "after step 1 of the SFT stage"),
            (signal.SIGINT, Learner, "forward_backward", 2, None, "after step 2 of the SFT stage"),
            (signal.SIGTERM, Engine, "sample", 1, None, "before step 1"),  # the evaluation before GRPO
            (signal.SIGINT, Learner, "prepare", 1, None, "before step 1"),
        ),
        *_marked(
            SLOW,
            (signal.SIGTERM, Learner, "prepare", 2, 1, "after step 1"),
            (signal.SIGHUP, Learner, "prepare", 3, 2, "after step 2"),
        ),
    ],
)
def test_contract_9_a_signal_at_any_time_leaves_a_step_boundary(
    micro_config, whole, tmp_path, monkeypatch, owner, name, call, saved, message, kind
):
    folder, handler = tmp_path / "run", signal.getsignal(kind)
    with monkeypatch.context() as patch:
        _at_call(patch, owner, name, call, kind)
        with pytest.raises(Stopped, match=f"stopped {message}; go on") as stopped:
            train(micro_config(folder, **SMALL))
    assert stopped.value.number == kind
    assert signal.getsignal(kind) == handler
    assert list(checkpoint.saved(folder / "checkpoints")) == ([saved] if saved else [])
    _resumes_to_the_same(micro_config, folder, whole)


def test_contract_9_the_step_in_progress_is_given_up_between_two_micro_batches(
    micro_config, whole, tmp_path, monkeypatch
):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        updates: list[int] = []
        make = Update.make
        patch.setattr(Update, "make", lambda self, step, *rest: (updates.append(step), make(self, step, *rest))[1])
        losses = _at_call(patch, PolicyTerm, "scalar", 10**9)
        forward_backward = Learner.forward_backward

        def second_step(self, batch, *arguments, **given):
            if batch.from_rollouts and batch.step == 2:
                losses.clear()
                _at_call(patch, Update, "backward", 2)
            return forward_backward(self, batch, *arguments, **given)

        patch.setattr(Learner, "forward_backward", second_step)
        with pytest.raises(Stopped, match="stopped after step 1"):
            train(micro_config(folder, **SMALL))
    assert len(losses) == 2 < len(read_rollouts(folder, 2)) / 4, "two micro-batches of step 2, and no more"
    assert updates == [1, 2, 3, 1]  # those of the SFT stage, and step 1
    assert list(checkpoint.saved(folder / "checkpoints")) == [1]
    _resumes_to_the_same(micro_config, folder, whole)


@pytest.mark.slow
def test_a_step_whose_first_update_is_made_is_finished(micro_config, tmp_path, monkeypatch):
    given = {"learner.updates_per_batch": 2}
    with monkeypatch.context() as patch:
        _at_call(patch, Update, "make", 3 + 1)  # the first update of step 1
        with pytest.raises(Stopped, match="stopped after step 1"):
            train(micro_config(tmp_path / "a", **SMALL | given))
    assert read_metrics(tmp_path / "a")[-1]["learner/updates"] == 2
    train(micro_config(tmp_path / "b", steps=1, **SMALL | given))
    first, second = _weights(tmp_path / "a", 1), _weights(tmp_path / "b", 1)
    assert all(first[name].equal(tensor) for name, tensor in second.items())


@pytest.mark.slow
@pytest.mark.parametrize("last", [2, 3])
def test_contract_9_an_evaluation_that_was_given_up_is_made_when_the_run_goes_on(
    micro_config, whole, tmp_path, monkeypatch, last
):
    folder, record = tmp_path / "run", HeldOut.evaluate

    def interrupted(self, step, *rest):
        if step == last:
            _terminate()
        return record(self, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(HeldOut, "evaluate", interrupted)
        with pytest.raises(Stopped, match=f"stopped after step {last}"):
            train(micro_config(folder, **SMALL))
    assert "eval/reward_mean" not in read_metrics(folder)[last]
    assert not (folder / "policy").exists()
    _resumes_to_the_same(micro_config, folder, whole)
    assert (folder / "policy").exists()


def _events(folder, name: str) -> list[dict]:
    return [e for e in map(json.loads, (folder / "events.jsonl").read_text().splitlines()) if e["event"] == name]


def _fails_at_call(monkeypatch, owner, name: str, number: int, error: Exception) -> None:
    """`owner.name` raises when it is called for the number-th time."""
    real, calls = getattr(owner, name), []

    def called(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, called)


FULL = OSError(errno.ENOSPC, "No space left on device")
REWARD = RewardFailed("boom", RewardFailure("letters", "a", 0, "raised", "boom"))


@pytest.mark.parametrize(
    ("owner", "name", "call", "error", "saved"),
    [
        (Task, "score", 4, REWARD, 1),  # two in the evaluation before GRPO, then one a step
        *_marked(
            pytest.mark.slow,
            (LocalPool, "sample", 4, RolloutError("workers died 4 times"), 1),
            (
                LocalPool,
                "sync_weights",
                3,
                RolloutError("workers died 4 times"),
                2,
            ),  # one before step 1, then one a step
            (Update, "backward", 3 + 4, NonFiniteStep("the loss is nan"), None),  # the SFT stage takes three
            (RunLog, "rollouts", 5, FULL, 2),
            (HeldOut, "evaluate", 3, REWARD, 3),
            (Learner, "forward_backward", 3, NonFiniteStep("the loss is nan"), "SFT stage"),
        ),
    ],
)
def test_contract_9_a_failure_saves_the_last_whole_step(
    micro_config, whole, tmp_path, monkeypatch, owner, name, call, error, saved
):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        _fails_at_call(patch, owner, name, call, error)
        with pytest.raises(type(error), match=str(error.args[-1])):
            train(micro_config(folder, **SMALL))
    steps = list(checkpoint.saved(folder / "checkpoints"))
    [event] = _events(folder, "failed")
    assert type(error).__name__ in event["error"]
    aborted = [(event["step"], event["function"], event["message"]) for event in _events(folder, "reward_error")]
    assert aborted == ([(2, "letters", "boom")] if owner is Task else [])
    if saved == "SFT stage":
        assert steps == []
        assert list(checkpoint.saved(folder / "warm_start_checkpoints")) == [2] == [event["saved_step"]]
    elif saved:
        assert steps == [saved] == [event["saved_step"]]
    _resumes_to_the_same(micro_config, folder, whole)


@pytest.mark.slow
def test_a_step_that_fails_after_its_first_update_is_kept_with_its_line(micro_config, tmp_path, monkeypatch):
    _fails_at_call(monkeypatch, Update, "make", 3 + 4, NonFiniteStep("the gradient norm is nan"))
    with pytest.raises(NonFiniteStep):
        train(micro_config(tmp_path / "run", **SMALL | {"learner.updates_per_batch": 2}))
    assert list(checkpoint.saved(tmp_path / "run/checkpoints")) == [2]
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [0, 1, 2]


def test_a_failure_that_cannot_be_saved_is_told_as_it_is(micro_config, tmp_path, monkeypatch, capsys):
    """The disk is full for everything: the message is that of the first failure."""
    folder = tmp_path / "run"
    _fails_at_call(monkeypatch, RunLog, "rollouts", 2, OSError(errno.ENOSPC, "No space left", "rollouts/step_000002"))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensor_files, "save_file", full)
    with pytest.raises(OSError, match="rollouts/step_000002"):
        train(micro_config(folder, **SMALL))
    [event] = _events(folder, "failed")
    assert event["saved_step"] == 0
    assert "cannot write checkpoint" in event["not_saved"]


@pytest.mark.slow
def test_a_run_whose_events_cannot_be_written_either_is_saved_and_told(micro_config, whole, tmp_path, monkeypatch):
    """Events and metrics are on a full disk, checkpoints on another one."""
    folder, append = tmp_path / "run", log.append_line
    with monkeypatch.context() as patch:

        def full(stream, values):
            if values.get("step") == 2 or values.get("event") == "failed":
                raise OSError(errno.ENOSPC, "No space left", stream.name)
            append(stream, values)

        patch.setattr(log, "append_line", full)
        with pytest.raises(OSError, match="metrics.jsonl"):
            train(micro_config(folder, **SMALL))
    assert list(checkpoint.saved(folder / "checkpoints")) == [2]
    _resumes_to_the_same(micro_config, folder, whole)


def _output_of(code: str) -> tuple[int, str, str]:
    """How a process that runs this ends, and what it prints."""
    with Copy([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        printed, errors = process.communicate(timeout=60)
    return process.returncode, printed, errors


def test_the_second_signal_ends_the_process_at_once():
    pairs = [("SIGTERM", "SIGTERM"), ("SIGINT", "SIGINT"), ("SIGHUP", "SIGHUP")]
    for first, second in (*pairs, ("SIGHUP", "SIGTERM"), ("SIGTERM", "SIGINT")):
        code = "import os, signal, time\nfrom grpo.run.stop import signals\nwith signals.heard(lambda number: None):\n"
        code += f"    os.kill(os.getpid(), signal.{first})\n    assert signals.number\n    print('once', flush=True)\n"
        code += f"    os.kill(os.getpid(), signal.{second})\n    time.sleep(60)\n"
        assert _output_of(code)[:2] == (-signal.Signals[second], "once\n"), (first, second)


@pytest.mark.slow
@pytest.mark.parametrize("begun", [pytest.param(False, marks=pytest.mark.long), True])
def test_a_signal_while_ray_starts_asks_as_any_other(micro_config, whole, tmp_path, monkeypatch, begun):
    """Ray's answer to SIGTERM is sys.exit from the beginning of its start on, and later a handler in C++."""
    folder = tmp_path / "run"
    owner, name = (ray, "init") if begun else (ray._private.node.Node, "__init__")
    real = getattr(owner, name)

    def called(*arguments, **named):
        if not begun:
            _terminate()
        result = real(*arguments, **named)
        if begun:
            _terminate()
        return result

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, called)
        with pytest.raises(Stopped, match="stopped before step 1; go on"):
            train(micro_config(folder, **SMALL | {"rollout.workers": 1}))
    assert not ray.is_initialized()
    train(micro_config(folder, **SMALL | {"rollout.workers": 0}), resume="auto", force=True)
    assert _untimed(folder) == _untimed(whole)


def test_a_second_signal_in_a_command_that_takes_notes_once_ends_it_where_it_is():
    """As after Ctrl-C in the recovery of `quartet convert`; a third one ends the process at once."""
    usual, came = signal.getsignal(signal.SIGINT), []
    with signals.heard():
        signals.unwinds = True
        with signals.heard(came.append, once=True):
            _terminate(signal.SIGINT)
            assert (came, signals.number) == ([signal.SIGINT], 0)
            with pytest.raises(Stopped, match="interrupted") as stopped:
                _terminate(signal.SIGINT)
        assert (stopped.value.exit_code, signals.number) == (130, signal.SIGINT)
        assert signals.stopped(OSError("what a library makes of it")).exit_code == 130
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == usual
    assert not signals.unwinds
    assert signals.stopped(OSError("disk full")) is None


def test_a_stop_travels_between_processes_with_what_it_says():
    stopped = Stopped(number=signal.SIGINT, everywhere=True)
    stopped.at(3, " of the SFT stage")
    stopped.at(9)
    copy = pickle.loads(pickle.dumps(stopped))
    assert str(copy) == "stopped after step 3 of the SFT stage; go on with --resume auto"
    assert vars(copy) == {"number": signal.SIGINT, "everywhere": True, "saved": True}


def test_a_terminal_that_is_closed_ends_nothing_before_its_time():
    """SIGHUP comes when the terminal is gone: what is printed from then on must not fail."""
    code = "import os, signal, time\nfrom grpo.run.stop import signals\nsignal.alarm(60)\n"
    code += "with signals.heard(lambda number: None):\n"
    code += "    print('begun', flush=True)\n    while not signals.number: time.sleep(0.01)\n"
    code += "    print('shown to nobody', flush=True)\n"
    code += "    os.write(int(os.environ['OUT']), signal.Signals(signals.number).name.encode())\n"
    end, out = os.pipe()
    child, terminal = pty.fork()
    if child == 0:
        os.set_inheritable(out, True)
        os.execve(sys.executable, [sys.executable, "-c", code], os.environ | {"OUT": str(out)})
    os.close(out)
    assert os.read(terminal, 5) == b"begun"
    os.close(terminal)
    with os.fdopen(end, "rb") as stream:
        assert stream.read() == b"SIGHUP"
    assert os.waitpid(child, 0)[1] == 0


def test_of_the_signals_that_were_ignored_sigint_alone_asks():
    """`nohup` ignores SIGHUP, and means it. A script ignores SIGINT for its background jobs, whatever they are."""
    for kind, asked in ((signal.SIGHUP, False), (signal.SIGTERM, False), (signal.SIGINT, True)):
        before = signal.signal(kind, signal.SIG_IGN)
        try:
            with signals.heard(lambda number: None):
                _terminate(kind)
                assert bool(signals.number) == asked, kind
            assert signal.getsignal(kind) == signal.SIG_IGN
        finally:
            signal.signal(kind, before)


def test_check_raises_once_it_was_asked_for_and_the_former_handler_comes_back():
    handler = signal.getsignal(signal.SIGTERM)
    with signals.heard(lambda number: None):
        signals.check()
        _terminate()
        with pytest.raises(Stopped):
            signals.check()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) == handler


def test_a_process_that_is_killed_has_last_words():
    """Also where a child outlives it."""
    killed, ends = ["os._exit(1)", "os.kill(os.getpid(), 9)"], ["sys.exit(3)", "1 / 0"]
    for end in (*killed, *ends):
        script = f"""
import os, subprocess, sys
from grpo.run.stop import last_words
with last_words("go on"):
    child = subprocess.Popen(["sleep", "600"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    print(child.pid, flush=True)
    {end}
"""
        _, printed, errors = _output_of(script)
        os.kill(int(printed), signal.SIGKILL)
        assert ("go on" in errors.splitlines()) == (end in killed), end

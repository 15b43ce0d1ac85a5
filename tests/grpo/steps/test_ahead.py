"""Batches that are sampled ahead: the same bits whatever the timing, and nothing lost by a stop (contract 12)."""

import os
import random
import signal
import threading
import time
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import psutil
import pytest
import ray
from safetensors.torch import load_file
from start_ranks import end_of, run_ranks, start_ranks

from grpo.evaluation.held_out import HeldOut
from grpo.learner.learner import Learner
from grpo.learner.parallel import ALONE
from grpo.run import checkpoint
from grpo.run.records import read_events, read_metrics, read_rollouts
from grpo.run.stop import Stopped, signals
from grpo.session import Session
from grpo.steps.ahead import OLDER, Batches
from grpo.steps.collector import Collector
from grpo.task.task import Task
from grpo.train import train
from rewards.group_score import RewardFailed, RewardFailure
from rollout.cluster import start_ray
from rollout.local_pool import LocalPool

RUN = {"steps": 6, "eval.limit": 3, "eval.every": 3, "checkpoint.every": 2}
HARD = {"curriculum.by_difficulty": True, "rollout.refill_draws": 1}
both = pytest.mark.parametrize("ahead", [1, 2])


def slow(*values):
    """Another case of what a quick one proves."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def cluster():
    start_ray(4)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def in_process():
    """`with in_process():` a copy of the policy in this process samples, as a Ray worker would, which starts slowly."""

    @contextmanager
    def replaced():
        def pool_of(policy, options):
            return LocalPool(policy.merged(), options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("grpo.steps.pool.open_pool", pool_of)
            yield

    return replaced


@pytest.fixture
def without_ray(in_process):
    with in_process():
        yield


@pytest.fixture(scope="module")
def options(micro_config):
    return lambda folder, ahead, **given: micro_config(folder, **RUN | HARD | {"rollout.ahead": ahead} | given)


@pytest.fixture(scope="module")
def whole(options, in_process, tmp_path_factory):
    """The folders of undisturbed runs."""
    folders = {ahead: tmp_path_factory.mktemp("ahead") / "run" for ahead in (1, 2)}
    with in_process():
        for ahead, folder in folders.items():
            train(options(folder, ahead))
    return folders


def kept(folder, step: int) -> dict:
    """Everything of a checkpoint: tensors as bytes, and the state."""
    saved = checkpoint.load(folder / f"checkpoints/step_{step:06d}")
    tensors = {
        (kind, name): t.numpy().tobytes() for kind, mapping in saved.tensors.items() for name, t in mapping.items()
    }
    for drawn in saved.state["curriculum"].get("batches", {}).values():
        drawn["metrics"] = {name: value for name, value in drawn["metrics"].items() if not name.startswith("time/")}
    return tensors | {"state": {name: part for name, part in saved.state.items() if name not in ("log", "unwritten")}}


def untimed(folder) -> list[dict]:
    # A publication that a stop cuts short has no canaries.
    parts = ("time/", "speed/", "memory/", "run/", "publish/", "canary/", "faults/")
    return [{k: v for k, v in line.items() if not k.startswith(parts)} for line in read_metrics(folder)]


def same(folder, other, steps: int = 6, first: int = 2) -> None:
    """Metrics, rollouts, and the checkpoints from step `first` on."""
    assert untimed(folder) == untimed(other)
    for step in range(first, steps + 1, 2):
        assert kept(folder, step) == kept(other, step)
    for step in range(1, steps + 1):
        assert read_rollouts(folder, step) == read_rollouts(other, step)


def late(patch, chance: random.Random, owner: type, name: str) -> None:
    """Every call begins after a random delay."""
    real = getattr(owner, name)

    def called(*arguments, **named):
        time.sleep(chance.random() / 5)
        return real(*arguments, **named)

    patch.setattr(owner, name, called)


def mortal(patch, chance: random.Random, every: int) -> None:
    """In every n-th step a worker of this process is killed at a random moment."""
    real = Learner.forward_backward

    def kill(after: float) -> None:
        time.sleep(after)
        children = psutil.Process().children(recursive=True)
        if workers := [child for child in children if "".join(child.cmdline()).startswith("ray::Worker")]:
            chance.choice(workers).kill()

    def forward_backward(self, batch, *arguments, **given):
        if batch.from_rollouts and batch.step % every == 0:
            threading.Thread(target=kill, args=[chance.random() / 2]).start()
        return real(self, batch, *arguments, **given)

    patch.setattr(Learner, "forward_backward", forward_backward)


@both
def test_contract_12_a_batch_has_the_weights_of_its_schedule(whole, ahead):
    versions = [{row["policy_version"] for row in read_rollouts(whole[ahead], step)} for step in range(1, 7)]
    assert versions == [{max(0, step - 1 - ahead)} for step in range(1, 7)]
    ages = [line.get("mismatch/age_mean", 0) for line in read_metrics(whole[ahead]) if "loss/total" in line]
    assert ages == [min(ahead, step) for step in range(6)]


@pytest.mark.parametrize("ahead", [slow(1), 2])
@pytest.mark.usefixtures("without_ray")
def test_contract_12_an_evaluation_has_the_weights_of_its_step(options, tmp_path, ahead, monkeypatch):
    seen, real = [], HeldOut.evaluate

    def evaluate(self, step, *arguments):
        seen.append((step, self.pool.engine.version))
        return real(self, step, *arguments)

    monkeypatch.setattr(HeldOut, "evaluate", evaluate)
    train(options(tmp_path / "run", ahead, steps=5, **{"eval.every": 2}))
    assert seen == [(step, step) for step in (0, 2, 4, 5)]


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_contract_12_timing_deaths_and_workers_change_no_bit(options, whole, tmp_path, monkeypatch):
    """Two Ray workers, of which one is killed, against a run in one process that nothing delays."""
    chance = random.Random(0)
    late(monkeypatch, chance, Collector, "collect")
    late(monkeypatch, chance, Learner, "forward_backward")
    mortal(monkeypatch, chance, every=4)
    train(options(tmp_path / "run", 2, **{"rollout.workers": 2}))
    assert [event for event in read_events(tmp_path / "run") if event["event"] == "lost"]
    same(tmp_path / "run", whole[2])


@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize(("ahead", "stop"), [(1, 3), (2, 2), slow(1, 2), slow(2, 3)])  # before and after an evaluation
def test_contract_12_a_stopped_run_goes_on_with_the_batches_in_flight(options, whole, tmp_path, ahead, stop):
    config = options(tmp_path / "run", ahead)
    with pytest.raises(Stopped):
        train(config, stop_after=stop)
    saved = checkpoint.load(tmp_path / f"run/checkpoints/step_{stop:06d}")
    assert list(saved.state["curriculum"]["batches"]) == [str(stop + 1 + i) for i in range(ahead)]
    assert OLDER not in saved.tensors
    train(config, resume="auto")
    same(tmp_path / "run", whole[ahead])


@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize(("ahead", "call"), [(1, 5), (2, 5), slow(1, 4), slow(2, 6)])
def test_contract_9_a_failure_ahead_of_its_time_saves_the_last_whole_step(
    options, whole, tmp_path, monkeypatch, ahead, call
):
    """The reward of a batch that is sampled ahead fails: the step in progress is undone, and no bit is lost."""
    folder, real, calls = tmp_path / "run", Task.score, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == call:
            raise RewardFailed("boom", RewardFailure("letters", "a", 0, "raised", "boom"))
        return real(*arguments)

    config = options(folder, ahead)
    with monkeypatch.context() as patch:
        patch.setattr(Task, "score", failing)
        with pytest.raises(RewardFailed, match="boom"):
            train(config)
    train(config, resume="auto")
    assert kept(folder, 6) == kept(whole[ahead], 6)


@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize(  # the weights of batch 4 are those before step 2, which is saved anyway, and of 5 step 3
    ("batch", "how"), [(4, "signal"), (5, "failure"), slow(4, "failure"), slow(5, "signal")]
)
def test_contract_9_a_batch_whose_weights_are_gone_is_sampled_with_them_again(
    options, whole, tmp_path, monkeypatch, batch, how
):
    """The run ends after the update that has changed the weights that this batch needs."""
    folder, collect, step, updated = tmp_path / "run", Collector.collect, Session.optim_step, threading.Event()

    def learn(self, **given):
        metrics = step(self, **given)
        if self.step == batch - 2 and not self.run.inner:  # the warm start has steps, too
            updated.set()
        return metrics

    def ending(self, number, *arguments):
        if number != batch:
            return collect(self, number, *arguments)
        assert updated.wait(60)
        if how == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
            while not signals.number:
                time.sleep(0.01)
        collect(self, number, *arguments)
        raise RewardFailed("boom", RewardFailure("letters", "a", 0, "raised", "boom"))

    config = options(folder, 2)
    with monkeypatch.context() as patch:
        patch.setattr(Session, "optim_step", learn)
        patch.setattr(Collector, "collect", ending)
        with pytest.raises(Stopped if how == "signal" else RewardFailed):
            train(config)
    saved = checkpoint.load(folder / f"checkpoints/step_{batch - 2:06d}")
    assert saved.state["curriculum"]["older_version"] == batch - 3
    assert OLDER in saved.tensors
    train(config, resume="auto")
    same(folder, whole[2], first=4)


@pytest.mark.usefixtures("without_ray")
def test_contract_9_a_batch_that_fails_just_before_the_update_undoes_the_step(options, whole, tmp_path, monkeypatch):
    folder, collect, start = tmp_path / "run", Collector.collect, Batches._start

    def failing(self, number, *arguments):
        if number == 4:
            raise RewardFailed("boom", RewardFailure("letters", "a", 0, "raised", "boom"))
        return collect(self, number, *arguments)

    def start_and_see(self):
        start(self)
        while self.next == 5 and not self._idle():
            time.sleep(0.01)

    config = options(folder, 2)
    with monkeypatch.context() as patch:
        patch.setattr(Collector, "collect", failing)
        patch.setattr(Batches, "_start", start_and_see)
        with pytest.raises(RewardFailed):
            train(config)
    assert list(checkpoint.saved(folder / "checkpoints")) == [1]
    train(config, resume="auto")
    same(folder, whole[2])


@both
def test_weights_that_a_batch_still_needs_are_kept_before_the_learner_changes_them(ahead):
    """For a worker that takes the place of one that died. With `ahead: 1` no batch needs them any more. While the third
    batch is sampled nobody waits for it, a step that has not begun is not undone, and the first is dropped."""
    kept, learned = [], threading.Event()

    def collect(step, quiet):
        assert quiet
        assert step < 3 or learned.wait(60)

    pool = SimpleNamespace(keep=lambda: kept.append(batches.next - 1))
    parts = {"prompt": None, "snapshot": lambda: None, "collect": collect, "pool": pool}
    config = SimpleNamespace(whole_rollout=SimpleNamespace(ahead=ahead))
    run = SimpleNamespace(config=config, inner=False, ranks=ALONE, saved=None, step=0, last=9)
    run.timed = lambda name: nullcontext()
    learner = SimpleNamespace(policy_version=0, state=lambda: [{"policy": {}}])
    batches = Batches(run, SimpleNamespace(**parts), learner, int)
    batches.begin()
    try:
        batches.before_update(1)
        assert kept == ([3] if ahead == 2 else [])
        batches.go_on(2)
    finally:
        learned.set()
        batches.complete()
    batches.undo()
    batches._take(2)
    assert list(batches.ready) == [2, 3]


@pytest.mark.parametrize(("ahead", "first"), [(0, True), (1, False), (1, True)])
def test_only_the_first_rank_has_a_thread_and_only_where_it_samples_ahead(ahead, first):
    config = SimpleNamespace(whole_rollout=SimpleNamespace(ahead=ahead))
    run = SimpleNamespace(config=config, inner=False, ranks=SimpleNamespace(first=first))
    assert bool(Batches(run, None, None, int)._thread) == bool(ahead and first)


def test_ahead_0_is_the_run_without_the_option(micro_config, tmp_path):
    for name, given in (("plain", {}), ("zero", {"rollout.ahead": 0})):
        train(micro_config(tmp_path / name, **HARD | given))
    assert kept(tmp_path / "plain", 3) == kept(tmp_path / "zero", 3)
    saved = checkpoint.load(tmp_path / "zero/checkpoints/step_000003").state["curriculum"]
    assert not {"batches", "later"} & saved.keys()


@pytest.mark.long
@pytest.mark.slow
@both
@pytest.mark.usefixtures("cluster")
def test_contract_12_twelve_disturbed_steps_give_the_same_bits(options, tmp_path, ahead):
    """0 (one is started) to 3 workers, random delays, a worker killed every third step, a stop in the middle."""
    more = {"steps": 12, "eval.every": 5}
    train(options(tmp_path / "quiet", ahead, **more))
    for workers in range(4):
        chance, folder = random.Random(10 * ahead + workers), tmp_path / f"run{workers}"
        config = options(folder, ahead, **more | {"rollout.workers": workers})
        with pytest.MonkeyPatch.context() as patch:
            late(patch, chance, Collector, "collect")
            late(patch, chance, Learner, "forward_backward")
            mortal(patch, chance, every=3)
            with pytest.raises(Stopped):
                train(config, stop_after=chance.randrange(3, 10))
            train(config, resume="auto")
        assert [event for event in read_events(folder) if event["event"] == "lost"]
        same(folder, tmp_path / "quiet", steps=12)


@pytest.mark.long
@pytest.mark.slow
@both
def test_contract_15_two_ranks_sample_ahead_as_one_process(run_words, tmp_path, ahead):
    """And a stop in the middle changes no bit of them either."""

    def words(name: str, *more: str) -> list[str]:
        # the costs that null measures differ between two runs
        given = {"steps": 5, "rollout.draft_tokens": 2, "rollout.ahead": ahead, "checkpoint.keep": "null"}
        return [*run_words(tmp_path / name, **given), *more]

    run_ranks(words("whole"), 2)
    run_ranks(words("alone"), 1)
    assert {code for code, _, _ in end_of(start_ranks(words("run", "--stop_after", "2"), 2))} == {143}
    run_ranks(words("run", "--resume", "auto"), 2)
    assert kept(tmp_path / "run", 5) == kept(tmp_path / "whole", 5)
    for step in range(1, 6):
        versions = {row["policy_version"] for row in read_rollouts(tmp_path / "whole", step)}
        assert versions == {max(0, step - 1 - ahead)}
        one, two = (read_rollouts(tmp_path / name, step) for name in ("alone", "whole"))
        assert [row["token_ids"] for row in one] == [row["token_ids"] for row in two]
    one, two = (load_file(tmp_path / name / "policy/model.safetensors") for name in ("alone", "whole"))
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-4

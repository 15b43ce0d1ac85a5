"""Batches that are sampled ahead: the same bits whatever the timing, and nothing lost by a stop (contract 12)."""

import json
import os
import random
import signal
import threading
import time
from concurrent.futures import wait
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import psutil
import pytest
import ray
import torch
from safetensors.torch import load_file
from start_ranks import end_of, run_ranks, start_ranks

from grpo.algorithm.dynamic_sampling import Drawn
from grpo.evaluation.held_out import HeldOut
from grpo.learner.learner import Learner
from grpo.learner.parallel import ONE_PROCESS
from grpo.run import checkpoint
from grpo.run.stop import Stopped, signals
from grpo.session import Session
from grpo.steps.ahead import OLDER, POLL_S, Batches
from grpo.steps.collector import Collector
from grpo.task.task import Task
from grpo.train import train
from review.readers.run_folder import read_events, read_metrics
from rewards.group_score import RewardFailed, RewardFailure
from rewards.records import read_rollouts
from rollout.workers.cluster import start_ray
from rollout.workers.local_pool import LocalPool

SMALL = {"prompts_per_step": 2, "rollout.max_completion_tokens": 6}
RUN = SMALL | {"steps": 6, "eval.limit": 3, "eval.every": 3, "checkpoint.every": 2, "sft.steps": 0}
BOOM = RewardFailed("boom", RewardFailure("letters", "a", 0, "raised", "boom"))
HARD = {"curriculum.shortest_share": 0.5, "rollout.max_resamples": 1}
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
    return lambda folder, ahead, **given: micro_config(folder, **RUN | HARD | {"rollout.staleness": ahead} | given)


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
    parts = ("time/", "speed/", "memory/", "run/", "sync/", "sync_check/", "faults/")
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
@pytest.mark.parametrize(  # before and after an evaluation
    ("ahead", "stop"), [(1, 3), slow(2, 2), slow(1, 2), slow(2, 3)]
)
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
@pytest.mark.parametrize("ahead", [slow(1), 2])
def test_contract_12_batches_in_flight_of_a_checkpoint_are_of_its_own_steps(options, tmp_path, ahead):
    """A loop that has loaded a later checkpoint found none of its next step: KeyError."""
    given = {"eval.limit": 0, "eval.every": None, "steps": 4}
    versions = {}
    with Session.open(options(tmp_path / "first", ahead, **given)) as session:
        for step in session.run.steps():
            if step == 4:
                later = session.save(tmp_path / "later")
            session.learn(session.prepare(session.draw(step)))
    with Session.open(options(tmp_path / "second", ahead, **given)) as session:
        for step in session.run.steps():
            if step == 2:
                session.load(later)
            drawn = session.draw(step)
            versions[int(step)] = {c.policy_version for group in drawn.groups for c in group.completions}
            session.learn(session.prepare(drawn))
    assert versions == {1: {0}, 2: {3}, 3: {3}, 4: {4 if ahead == 1 else 3}}


@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize(("ahead", "call"), [slow(1, 5), slow(2, 6)])
def test_contract_9_a_failure_ahead_of_its_time_saves_the_last_whole_step(
    options, whole, tmp_path, monkeypatch, ahead, call
):
    """The reward of a batch that is sampled ahead fails: the step in progress is undone, and no bit is lost."""
    folder, real, calls = tmp_path / "run", Task.score, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == call:
            raise BOOM
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
    ("batch", "how"), [(4, "signal"), slow(5, "failure"), slow(4, "failure"), slow(5, "signal")]
)
def test_contract_9_a_batch_whose_weights_are_gone_is_sampled_with_them_again(
    options, whole, tmp_path, monkeypatch, batch, how
):
    """The run ends after the update that has changed the weights that this batch needs."""
    folder, collect, step, updated = tmp_path / "run", Collector.collect, Session.optim_step, threading.Event()

    def learn(self, **given):
        metrics = step(self, **given)
        if self.step == batch - 2:
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
        raise BOOM

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


@pytest.mark.slow
@pytest.mark.usefixtures("without_ray")
def test_contract_9_a_batch_that_fails_just_before_the_update_undoes_the_step(options, whole, tmp_path, monkeypatch):
    folder, collect, start = tmp_path / "run", Collector.collect, Batches._start

    def failing(self, number, *arguments):
        if number == 4:
            raise BOOM
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


def by_hand(ahead: int, collect, **given) -> Batches:
    """Batches of a run of five steps. `publish` gives the workers the version of the learner, and `collect` gets its
    arguments and the version of the workers; `done` notes what else happens."""
    run = {"inner": False, "saved": None, "ranks": ONE_PROCESS, "step": 0, "last": 5, "done": []} | given
    config = SimpleNamespace(whole_rollout=SimpleNamespace(staleness=ahead))
    run = SimpleNamespace(config=config, timed=lambda name: nullcontext(), **run)
    learner = SimpleNamespace(policy_version=run.step, policy="policy", masters="masters")
    learner.copy_weights = lambda: {"w": torch.tensor(learner.policy_version)}
    collector = SimpleNamespace(prompt=None, state_dict=lambda: {"order": 1}, version=0)
    collector.collect = lambda step, quiet=False: collect(step, quiet, collector.version)
    collector.pool = SimpleNamespace(keep_weights=lambda: run.done.append(("keep", batches.next)))
    collector.snapshot = lambda: f"before {batches.next}"
    collector.put_back = lambda before: run.done.append(before)
    collector.load_state_dict = lambda state: run.done.append(state["order"])

    def sync_weights() -> None:
        collector.version = learner.policy_version

    batches = Batches(run, collector, learner, sync_weights)
    return batches


def learn(batches: Batches, step: int) -> None:
    """A step of the loop, whose evaluation publishes where nothing is sampled ahead."""
    assert batches.take_batch(step).draws == [step]
    while not batches._idle():
        time.sleep(0.001)
    batches.go_on(step)
    batches.before_update(step)
    batches.learner.policy_version += 1
    batches.run.step = step
    if not batches.staleness:
        batches.sync_weights()


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_contract_12_what_is_sampled_ahead_by_hand(ahead):
    """A batch has the weights of its schedule. Those that nothing was learned from yet are in the state, and none is
    lacking. A step that is undone gives back what was drawn for it alone."""
    told = []

    def collect(step, quiet, version):
        told.append((step, quiet, version))
        return Drawn([], [], [step])

    batches = by_hand(ahead, collect)
    batches.start_sampling()
    for step in range(1, 6):
        learn(batches, step)
        state = batches.state_dict()
        waiting = [str(other) for other in range(step + 1, min(step + ahead, 5) + 1)]
        assert state == {"order": 1} | ({"batches": state.get("batches")} if ahead else {})
        assert list(state.get("batches", [])) == waiting
        assert batches.tensors() == {}
    assert told == [(step, ahead > 0, max(0, step - 1 - ahead)) for step in range(1, 6)]
    undone = [entry for entry in batches.run.done if entry[0] != "keep"]
    batches.undo()
    batches.run.step = 4
    batches.undo()
    assert undone == []
    assert [entry for entry in batches.run.done if entry[0] != "keep"] == ([] if ahead else ["before 5"])


@pytest.mark.parametrize(("ahead", "first"), [(0, True), (1, False), (1, True)])
def test_only_the_first_rank_has_a_thread_and_only_where_it_samples_ahead(ahead, first):
    batches = by_hand(ahead, None, ranks=SimpleNamespace(first=first))
    assert bool(batches._thread) == bool(ahead and first)
    assert by_hand(1, None, inner=True).staleness == 0


@both
def test_weights_that_a_batch_still_needs_are_kept_before_the_learner_changes_them(ahead):
    """For a worker that takes the place of one that died. With `ahead: 1` no batch needs them any more. While the third
    batch is sampled nobody waits for it, a step that has not begun is not undone, and the first is dropped."""
    learned = threading.Event()

    def collect(step, quiet, version):
        assert step < 3 or learned.wait(60)

    batches = by_hand(ahead, collect)
    batches.start_sampling()
    batches.is_asked = True
    try:
        batches.before_update(1)
        assert batches.run.done == ([("keep", 4)] if ahead == 2 else [])
        batches.go_on(2)
        assert batches.next == 4
    finally:
        learned.set()
        batches.undo()
    assert batches._sampling is None
    batches._take_ready(2)
    assert list(batches.ready) == [2, 3]


def test_contract_9_a_batch_that_fails_after_the_update_is_sampled_again_by_hand(monkeypatch):
    """The fourth has the weights of the first step, and fails when the second has learned: they are saved."""
    learned, waits, held, failing = threading.Event(), [], [], [4]

    def wait_for(futures, seconds):
        waits.append(seconds)
        if len(waits) == 1:  # it is not done in this time
            return SimpleNamespace(done=set())
        learned.set()
        return wait(futures)

    def collect(step, quiet, version):
        assert version == max(0, step - 3)
        if step in failing:
            assert learned.wait(60)
            raise BOOM
        return Drawn([], [], [step])

    batches = by_hand(2, collect)
    batches.start_sampling()
    learn(batches, 1)
    batches.complete()
    monkeypatch.setattr("grpo.steps.ahead.wait", wait_for)
    learn(batches, 2)
    assert batches.run.done[-1] == ("keep", 5)
    state = json.loads(json.dumps(batches.state_dict()))
    assert waits == [POLL_S] * 2
    assert (state["older_version"], list(state["batches"]), batches.next) == (1, ["3"], 4)
    assert batches.tensors() == {OLDER: {"w": torch.tensor(1)}}
    assert batches.run.done[-1] == "before 5"
    with pytest.raises(RewardFailed):
        batches.take_batch(3)
    batches.complete()

    failing.clear()
    monkeypatch.setattr("grpo.steps.ahead.put_weights", lambda *given: held.append(given))
    again = by_hand(2, collect, step=2, saved=SimpleNamespace(step=2, tensors=batches.tensors()))
    again.load_state_dict(state)
    again.start_sampling()
    assert again.run.done == [1]
    assert held == [({"w": torch.tensor(version)}, "policy", "masters") for version in (1, 2)]
    assert (list(again.ready), again.next, again.learner.policy_version, again.collector.version) == ([3, 4], 5, 2, 2)
    for step in (3, 4, 5):
        learn(again, step)


@pytest.mark.long
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
@both
def test_contract_15_two_ranks_sample_ahead_as_one_process(run_words, tmp_path, ahead):
    """And a stop in the middle changes no bit of them either."""

    def words(name: str, *more: str) -> list[str]:
        # the costs that null measures differ between two runs
        given = {"steps": 5, "rollout.draft_tokens": 2, "rollout.staleness": ahead, "checkpoint.keep": "null"}
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

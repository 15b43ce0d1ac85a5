"""The pool of a run: what happens to its workers is told, and a run whose workers or whose Ray fail ends by itself."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import syncing_ranks
from start_ranks import results_of_ranks

import grpo.steps.pool
from grpo.config.run import LogOptions
from grpo.learner.learner import Learner
from grpo.learner.parallel import ONE_PROCESS
from grpo.run.log import RunLog
from grpo.run.stop import Stopped, signals
from grpo.steps.pool import open_run_pool
from grpo.task.task import Task
from grpo.train import train
from review.readers.run_folder import read_metrics
from rollout.pool import PoolOptions
from rollout.workers.local_pool import LocalPool

ROOT = Path(__file__).parents[3]


def run_of(config, run_log) -> SimpleNamespace:
    """As much of a run as its pool asks for."""
    return SimpleNamespace(config=config, log=run_log, ranks=ONE_PROCESS)


def events(folder: Path, kind: str) -> list[dict]:
    lines = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    return [event for event in lines if event["event"] == kind]


@pytest.fixture
def opened(micro_config, micro_policy, tmp_path, monkeypatch):
    """`opened(**options)`: what the pool of a run with two workers is opened with."""
    given: list[PoolOptions] = []
    monkeypatch.setattr(grpo.steps.pool, "open_pool", lambda _, options: given.append(options))

    @contextmanager
    def of_run(**options):
        config = micro_config(tmp_path, **{"rollout.workers": 2} | options)
        with RunLog(tmp_path, "", LogOptions(trackers=[]), quiet=True) as run_log:
            open_run_pool(run_of(config, run_log), micro_policy())
            yield given.pop()

    return of_run


def test_a_lost_worker_is_an_event_and_a_stop_ends_the_wait_for_one(opened, tmp_path, monkeypatch):
    monkeypatch.setattr(grpo.steps.pool, "TIMEOUT_S", 7.5)
    with signals.heard(lambda number: None), opened() as options:
        assert options.timeout_s == 7.5
        options.on_lost("worker 1", "it died", "it is replaced")
        options.check_stop()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped):
            options.check_stop()
    [event] = events(tmp_path, "lost")
    assert (event["what"], event["reason"], event["action"]) == ("worker 1", "it died", "it is replaced")


def test_what_was_lost_is_a_metric_of_its_step_and_samplers_sleep_while_the_learner_works(
    micro_config, tmp_path, monkeypatch
):
    """Only the order of the calls can be seen without a GPU."""
    calls: list[str] = []
    counts = iter([{"faults/worker": 2.0}, {}])

    def noted(owner, name, word):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given, **named: (calls.append(word), real(*given, **named))[1])

    for name in ("sync_weights", "sample", "sleep"):
        noted(LocalPool, name, name)
    noted(Learner, "forward_backward", "learn")
    monkeypatch.setattr(Task, "lost", lambda _: {"faults/reward_worker": 1.0})
    monkeypatch.setattr(LocalPool, "metrics", lambda _: next(counts))
    train(micro_config(tmp_path / "run", **{"steps": 2, "sft.steps": 0, "eval.limit": 0}))
    seen = [call for call, former in zip(calls, [None, *calls], strict=False) if call != former]
    assert seen[: seen.index("sleep") + 3] == ["sync_weights", "sample", "sleep", "learn", "sync_weights"]
    assert seen.count("sleep") == 2
    lines = read_metrics(tmp_path / "run")
    assert [(line.get("faults/worker"), line["faults/reward_worker"]) for line in lines] == [(2, 1), (None, 1)]
    assert events(tmp_path / "run", "undocumented_metric") == []


def test_samplers_that_left_the_gpu_get_the_weights_though_nothing_was_learned(micro_config, tmp_path, monkeypatch):
    """Every group is tied, so that no step moves the policy."""
    awake: list[bool] = []

    def sleep(pool) -> None:
        pool.asleep = True

    def sync_weights(pool, weights, version, real=LocalPool.sync_weights) -> None:
        pool.asleep = False
        real(pool, weights, version)

    def sample(pool, *given, real=LocalPool.sample):
        awake.append(not pool.asleep)
        return real(pool, *given)

    for name, function in (("sleep", sleep), ("sync_weights", sync_weights), ("sample", sample)):
        monkeypatch.setattr(LocalPool, name, function)
    config = micro_config(tmp_path / "run", **{"steps": 3, "sft.steps": 0, "eval.limit": 0})
    train(config, reward=lambda completions, **_: [1.0] * len(completions))
    assert len(awake) >= 3
    assert all(awake)


def test_a_run_says_who_is_where(opened, tmp_path):
    with opened() as options:
        options.on_ready(1, {"node": "1a2b3c4d on a", "process": 7, "threads": 1})
    assert (options.gpus, options.placement_timeout_s, options.colocate) == (1.0, 300.0, None)
    [learner], [worker] = events(tmp_path, "learner"), events(tmp_path, "worker")
    assert (learner["rank"], learner["process"]) == (0, os.getpid())
    assert (worker["worker"], worker["node"], worker["process"]) == (1, "1a2b3c4d on a", 7)
    with opened(device="cpu") as options:
        assert options.gpus == 0.0


@pytest.mark.long
def test_ranks_that_share_a_policy_publish_its_adapters_alone(micro_policy, tmp_path):
    """Rank 0 gathers everything once, and later A, B and the draft head; the other ranks take part."""
    micro_policy(0).save(tmp_path / "policy")
    told, _ = results_of_ranks(syncing_ranks.main, tmp_path / "policy")
    first, *later = told
    assert first[0] == first[2]
    head = sum(name.startswith("mtp.") for name in micro_policy(0).weights())
    assert [sent for sent, *_ in later] == [head + 1] * 2  # and the expert bias
    assert [same for _, same, _ in told] == [True] * 3


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., subprocess.Popen]]:
    """A run with a Ray worker that goes on until something happens to it."""
    runs: list[subprocess.Popen] = []

    def start(timeout_s: float = 3600.0, **options: str) -> subprocess.Popen:
        words = {
            "model": "tiny",
            "output_dir": tmp_path / "run",
            "threads": 1,
            "data.task_options.levels": "[1]",
            "steps": 10000,
            "rollout.workers": 1,
        }
        words |= {"prompts_per_step": 2, "rollout.max_completion_tokens": 16, "rollout.draft_tokens": 0} | options
        code = f"import sys, grpo.steps.pool as pool; pool.TIMEOUT_S = {timeout_s}; from grpo.cli.parse import main; "
        command = [sys.executable, "-c", f"{code}sys.exit(main())", "train"]
        command += [word for key, value in words.items() for word in (f"--{key}", str(value))]
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_ADDRESS", "RAY_AUTH"))}
        runs.append(
            subprocess.Popen(
                command,
                env=environment | {"PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
                stderr=(tmp_path / "stderr").open("w"),
                text=True,
            )
        )
        return runs[-1]

    yield start
    for run in runs:
        children = psutil.Process(run.pid).children(recursive=True) if run.poll() is None else []
        run.kill()
        run.wait()
        for child in psutil.wait_procs(children, timeout=20)[1]:
            child.kill()


def until_step(run: subprocess.Popen, step: int) -> None:
    for text in run.stdout:
        assert "(raylet)" not in text  # Ray's own remarks
        if text.startswith(f"step {step:5d}  reward"):
            return
    raise AssertionError(f"the run ended before step {step}")


def below(run: subprocess.Popen, name: str) -> psutil.Process:
    """The process of that name; of a worker that is at work the name goes on."""
    [found] = [p for p in psutil.Process(run.pid).children(recursive=True) if p.name().startswith(name)]
    return found


def ends(run: subprocess.Popen, stderr: Path) -> tuple[int, list[str]]:
    """The exit code, and what `quartet` says; there must be no traceback, and nothing may be left running."""
    started = psutil.Process(run.pid).children(recursive=True)
    run.communicate(timeout=180)
    assert psutil.wait_procs(started, timeout=20)[1] == []
    text = stderr.read_text()
    assert "Traceback" not in text
    return run.returncode, [line for line in text.splitlines() if line.startswith("quartet:")]


@pytest.mark.long
def test_a_run_whose_worker_was_killed_goes_on_and_tells(start, tmp_path):
    run = start()
    until_step(run, 2)
    below(run, "ray::Worker").kill()
    until_step(run, 6)
    run.terminate()
    code, [said] = ends(run, tmp_path / "stderr")
    assert (code, "go on with --resume auto" in said) == (143, True)
    [event] = events(tmp_path / "run", "lost")
    assert (event["what"], event["action"]) == ("worker 0", "it is replaced")
    assert "was killed or crashed" in event["reason"]
    told = [line for line in read_metrics(tmp_path / "run") if "faults/worker" in line]
    assert [line["faults/worker"] for line in told] == [1]
    assert 0 < told[0]["faults/sampling_seconds"] < told[0]["time/rollout"] + told[0].get("time/sync", 0)


@pytest.mark.long
def test_a_stopped_worker_is_replaced_after_its_time_and_sigterm_ends_a_run_that_waits(start, tmp_path):
    run = start(timeout_s=30.0)
    until_step(run, 2)
    below(run, "ray::Worker").suspend()
    until_step(run, 6)
    [event] = events(tmp_path / "run", "lost")
    assert event["reason"] == "its shard took longer than 30 s"
    worker = below(run, "ray::Worker")
    worker.suspend()
    run.terminate()
    code, [said] = ends(run, tmp_path / "stderr")
    assert (code, "go on with --resume auto" in said) == (143, True)
    assert not worker.is_running()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "gcs_server",
        *(
            pytest.param(name, marks=pytest.mark.long)
            for name in ("raylet", "ray::RuntimeEnvAgent", "ray::DashboardAgent")
        ),
    ],
)
def test_a_run_whose_ray_dies_ends_with_one_message(start, tmp_path, name):
    run = start()
    until_step(run, 2)
    below(run, name).kill()
    code, [said] = ends(run, tmp_path / "stderr")
    assert code == 1
    assert re.search("Ray's.* has died.*go on with --resume auto$", said)

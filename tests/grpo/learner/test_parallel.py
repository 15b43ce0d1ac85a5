"""Several processes: the gradients of one, and nobody left hanging when one of them fails."""

import copy
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from two_ranks import gradients, groups_of

from grpo.config.run import BalanceOptions, LearnerOptions, LossOptions, MTPOptions
from grpo.data.word_problems import word_problems
from grpo.learner import parallel
from grpo.learner.learner import Learner
from grpo.learner.parallel import ALONE, Team, join
from grpo.run import checkpoint
from grpo.run.log import read_metrics, read_rollouts
from policies.presets import build

HERE = Path(__file__).parents[2] / "cases"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _ranks(command: list[str], size: int = 2) -> list[subprocess.Popen]:
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(size)}
    shared |= {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": str(size), "ACCELERATE_USE_CPU": "true"}
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def _end(processes: list[subprocess.Popen], timeout: float = 300) -> list[tuple[int, str, str]]:
    try:
        ended = []
        for process in processes:
            out, err = process.communicate(timeout=timeout)
            ended.append((process.returncode, out, err))
        return ended
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()


def test_one_process_is_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join(cpu=True) is ALONE
    assert ALONE.sum_metrics({"a": 1.0}) == {"a": 1.0}
    assert ALONE.share([1, 2]) == [1, 2]


def test_one_process_where_several_were_asked_for_is_refused(monkeypatch):
    """What `accelerate launch --cpu --num_processes 2` leaves in the environment of its only process."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    with pytest.raises(ValueError, match="--cpu starts one process .* use accelerate launch --multi_gpu"):
        join(cpu=True)


def _learned(ranks) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Gradients and metrics of one step."""
    corpus = [f"{row['question']}\n{row['answer']}\n" for row in word_problems("train", [1], count=50)]
    learner = Learner(
        build("micro", corpus, 0),
        LearnerOptions(tokens_per_micro_batch=40, max_grad_norm=1e9),
        MTPOptions(depth=2),
        LossOptions(top_entropy_quantile=0.5, entropy_coef=0.01),
        balance=BalanceOptions(bias_rate=0.01),
        ranks=ranks,
    )
    metrics = learner.step(learner.prepare(*groups_of(5)), 2)
    return gradients(learner), {name: value for name, value in metrics.items() if not name.startswith("time/")}


class TwoRanks:
    """torch.distributed for two ranks that run in turn, in one process, for several rounds.

    A call combines what its rank hands in with what the other rank handed in at the same place of the round before.
    What depends on one exchange is right a round later, so after as many rounds as exchanges depend on each other
    both ranks have the sums that two processes would have.
    """

    ReduceOp, DistError = dist.ReduceOp, dist.DistError

    def __init__(self) -> None:
        self.rank, self.before, self.now = 0, {0: [], 1: []}, {0: [], 1: []}

    def exchange(self, value):
        """The values of both ranks. In the first round the other rank has given none: then the own value, twice."""
        own, other = self.now[self.rank], self.before[1 - self.rank]
        own.append(copy.deepcopy(value))
        theirs = other[len(own) - 1] if len(own) <= len(other) else value
        return [value, theirs] if self.rank == 0 else [theirs, value]

    def all_reduce(self, tensor, op=dist.ReduceOp.SUM):
        total = sum(part.clone() for part in self.exchange(tensor))
        tensor.copy_(total / 2 if op == dist.ReduceOp.AVG else total)

    def all_gather_object(self, parts, own):
        parts[:] = self.exchange(own)


def test_contract_15_two_ranks_give_the_gradients_of_one(micro_preset, monkeypatch):
    """The arithmetic of several ranks without their processes, which the slow test below has."""
    one, expected = _learned(ALONE)
    world = TwoRanks()
    monkeypatch.setattr(parallel, "dist", world)
    for _ in range(4):
        results = []
        for rank in (0, 1):
            world.rank, world.now[rank] = rank, []
            team = object.__new__(Team)
            team.rank, team.size, team.device = rank, 2, torch.device("cpu")
            results.append(_learned(team))
        world.before = dict(world.now)
    for two, metrics in results:
        assert one.keys() == two.keys()
        for name, gradient in one.items():
            assert torch.linalg.vector_norm(gradient - two[name]) <= 1e-5 * torch.linalg.vector_norm(gradient), name
        assert metrics == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_two_gloo_processes_give_the_gradients_of_one(tmp_path):
    script = [str(HERE / "two_ranks.py"), str(tmp_path / "found.safetensors")]
    alone = subprocess.run([sys.executable, *script], capture_output=True, text=True, check=False)
    assert alone.returncode == 0, alone.stderr
    ended = _end(_ranks(script))
    assert [code for code, _, _ in ended] == [0, 0], ended
    one = load_file(tmp_path / "found0of1.safetensors")
    assert len(one) > 100
    for rank in (0, 1):
        two = load_file(tmp_path / f"found{rank}of2.safetensors")
        assert one.keys() == two.keys()
        for name, gradient in one.items():
            assert torch.linalg.vector_norm(gradient - two[name]) <= 1e-5 * torch.linalg.vector_norm(gradient), name
        first, second = (json.loads((tmp_path / f"found{n}.json").read_text()) for n in ("0of1", f"{rank}of2"))
        for kind in first:
            assert first[kind] == pytest.approx(second[kind], rel=1e-4, abs=1e-6), kind


# ---- whole runs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(micro_policy, letters, tmp_path_factory):
    """`run(folder, reward)`: the words of a small run behind `python -m grpo`."""
    model = tmp_path_factory.mktemp("model") / "micro"
    micro_policy(0).save(model)

    def words(folder: Path, reward: str = letters, command: str = "train", **given: object) -> list[str]:
        options = {
            "output_dir": folder,
            "model": model,
            "threads": 1,
            "warm_start.steps": 2,
            "warm_start.batch_size": 4,
            "data.levels": [1],
            "data.limit": 12,
            "rollout.max_completion_tokens": 6,
            "rewards": f"[{{function: '{reward}'}}]",
            "mtp.depth": 2,
            "log.trackers": "[]",
            "checkpoint.every": 1,
        }
        if command == "train":
            options |= {"steps": 2, "prompts_per_step": 3, "rollout.group_size": 3, "learner.learning_rate": 1e-4}
        return [
            *("-m", "grpo", command),
            *(word for key, value in (options | given).items() for word in (f"--{key}", str(value))),
        ]

    return words


def _weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return checkpoint.load(folder / f"checkpoints/step_{step:06d}").tensors["policy"]


@pytest.mark.slow
def test_a_run_of_two_ranks_through_accelerate_is_that_of_one(run, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    subprocess.run([sys.executable, *run(one)], check=True, capture_output=True)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launcher += ["--main_process_port", str(_free_port())]
    done = subprocess.run([*launcher, *run(two)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("learning in 2 processes on cpu") == 1
    assert done.stdout.count("step     1  reward") == 1, "rank 0 alone logs"
    assert done.stdout.count("warm start    2/2") == 1
    assert [line["step"] for line in read_metrics(two)] == [1, 2]
    for step in (1, 2):
        tokens = [[line["token_ids"] for line in read_rollouts(folder, step)] for folder in (one, two)]
        assert tokens[0] == tokens[1]
        first, second = _weights(one, step), _weights(two, step)
        for name, tensor in first.items():
            assert torch.allclose(tensor, second[name], rtol=1e-3, atol=2e-5), name


@pytest.mark.slow
def test_supervised_fine_tuning_of_two_ranks_is_that_of_one(run, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    given = {"rewards": "[{function: gsm8k}]", "warm_start.steps": 3}
    subprocess.run([sys.executable, *run(one, command="sft", **given)], check=True, capture_output=True)
    ended = _end(_ranks(run(two, command="sft", **given)))
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert ended[1][1:] == ("", "")
    for name, tensor in _weights(one, 3).items():
        assert torch.allclose(tensor, _weights(two, 3)[name], rtol=1e-3, atol=2e-5), name


FAILS = """
def fails(completions, **_):
    if not all("####" in completion for completion in completions):  # a gold solution passes the dry run
        raise ValueError("this reward is broken")
    return [1.0] * len(completions)
"""


@pytest.mark.slow
def test_a_failure_of_rank_0_ends_every_rank_with_its_message(run, tmp_path):
    (tmp_path / "own.py").write_text(FAILS)
    ended = _end(_ranks(run(tmp_path / "r", reward=f"{tmp_path / 'own.py'}:fails")))
    assert [code for code, _, _ in ended] == [1, 1]
    assert "this reward is broken" in ended[0][2]
    assert ended[1][2].startswith("quartet: rank 0 failed: RewardFailed:")
    assert "this reward is broken" in ended[1][2]
    for _, _, shown in ended:
        assert "Traceback" not in shown


@pytest.mark.slow
def test_a_refusal_of_rank_0_ends_every_rank(run, tmp_path):
    ended = _end(_ranks(run(tmp_path / "r", prompts_per_step=99)))
    assert [code for code, _, _ in ended] == [1, 1]
    assert "prompts_per_step=99, but there are" in ended[1][2]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_ends_the_other(run, tmp_path, victim):
    folder = tmp_path / "r"
    processes = _ranks(run(folder, steps=100000))
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not ((folder / "metrics.jsonl").exists() and read_metrics(folder)):
        time.sleep(0.1)
    processes[victim].kill()
    ended = _end(processes)
    assert ended[victim][0] == -signal.SIGKILL
    assert ended[1 - victim][0] == 1
    assert "quartet: " in ended[1 - victim][2]
    assert "gone" in ended[1 - victim][2]


@pytest.mark.slow
def test_sigterm_to_every_rank_saves_and_ends_all_of_them(run, tmp_path):
    folder = tmp_path / "r"
    processes = _ranks(run(folder, steps=100000, **{"checkpoint.every": 100000}))
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not ((folder / "metrics.jsonl").exists() and read_metrics(folder)):
        time.sleep(0.1)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    ended = _end(processes)
    assert ended[0][0] == 143
    last = read_metrics(folder)[-1]["step"]
    assert f"stopped after step {last}; go on with --resume auto" in ended[0][2]
    assert list(checkpoint.saved(folder / "checkpoints")) == [last]
    assert (ended[1][0], ended[1][2]) == (143, ended[0][2])

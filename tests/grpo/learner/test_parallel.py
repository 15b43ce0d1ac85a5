"""Several processes: the gradients of one, and nobody left hanging when one of them fails."""

import functools
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import many_ranks
import pytest
import torch
from start_ranks import end_of, results_of_ranks, start_ranks
from transformers import DeepseekV2Config, DeepseekV3Config, GPT2Config, JetMoeConfig, Qwen2Config, Qwen3MoeConfig

from grpo.config.learner import LoraOptions, ParallelOptions
from grpo.learner.parallel import ONE_PROCESS, join, refuse_layout
from grpo.run import checkpoint
from review.readers.run_folder import read_events, read_metrics
from rewards.records import read_rollouts

HERE = Path(__file__).parents[2] / "cases"


def test_one_process_is_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join(True, ParallelOptions()) is ONE_PROCESS
    assert ONE_PROCESS.sum_metrics({"a": 1.0}) == {"a": 1.0}
    assert ONE_PROCESS.share([1, 2]) == [1, 2]


def test_one_process_where_several_were_asked_for_is_refused(monkeypatch):
    """What `accelerate launch --cpu --num_processes 2` leaves in the environment of its only process."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    with pytest.raises(ValueError, match="--cpu starts one process .* use accelerate launch --multi_gpu"):
        join(True, ParallelOptions())


# ---- layouts ---------------------------------------------------------------------------------------------------------

SHAPE = DeepseekV3Config(n_routed_experts=4, moe_intermediate_size=16)
LORA = [
    *("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    *("experts", "router", "lm_head", "mtp"),
]
REPLAYED = {"routing_replay": True, "updates_per_batch": 2, "gradient_checkpointing": True}
QWEN3_MOE = {
    **{"model_type": "qwen3_moe", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8},
    **{"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}
OFTEN, MORE = (2, "often"), (2, "more")  # processes
CASES = {
    OFTEN: {
        "fsdp": {"parallel": {}},
        "tensor": {"parallel": {"tensor": 2}},
        "heads, both ways": {"parallel": {}, "heads": [0.5, 0]},
        "lora, all targets": {"parallel": {}, "lora": None},
    },
    MORE: {
        "fsdp with expert": {"parallel": {"fsdp": 2, "expert": 2}},
        "qwen3_moe, expert": {"parallel": {"fsdp": 2, "expert": 2}, "of_type": QWEN3_MOE},
        "copies": {"parallel": {"fsdp": 1}},
        "heads, both ways, tensor": {"parallel": {"tensor": 2}, "heads": [0.5, 0]},
        "lora, tensor": {"parallel": {"tensor": 2}, "lora": None},
        "value head": {"parallel": {}, "loss": {"advantage": "gae"}},
    },
    (4, "more"): {
        "fsdp x tensor": {"parallel": {"tensor": 2}},
        "fsdp x tensor with expert": {"parallel": {"tensor": 2, "expert": 4}},
        "copies x fsdp": {"parallel": {"fsdp": 2}},
        "lora and reference": {"parallel": {"tensor": 2}, "lora": LORA, "loss": {"beta": 0.1}},
        "lora, experts": {"parallel": {"tensor": 2, "expert": 2}, "lora": None, "learner": REPLAYED},
        "lora, copies": {"parallel": {"fsdp": 2, "expert": 2}, "lora": None},
        "reference": {"parallel": {}, "loss": {"loss_type": "grpo", "beta": 0.1}},
        "tied embeddings": {"parallel": {"tensor": 2}, "shape": {"tie_word_embeddings": True}},
        "replayed routing": {"parallel": {"expert": 2}, "learner": REPLAYED},
        "entropy": {"parallel": {}, "loss": {"top_entropy_quantile": 0.4, "entropy_coef": 0.01}},
    },
}


def _differences(size: int, folder: Path, cases: dict) -> dict[str, dict]:
    return results_of_ranks(many_ranks.main, folder, cases, size=size)[0]


@pytest.fixture(scope="module")
def differences(tmp_path_factory) -> Callable[[tuple[int, str]], dict[str, dict]]:
    """How far these layouts are from one process; they run once."""
    return functools.cache(lambda key: _differences(key[0], tmp_path_factory.mktemp(f"of{key[0]}"), CASES[key]))


def _check(found: dict) -> None:
    assert found["gradients"] <= 1e-5
    assert found["weights"] <= 1e-4
    assert found["losses"] <= 1e-3
    assert found["same_bits"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "case"),
    [pytest.param(key, case, marks=[pytest.mark.long] * (key != OFTEN)) for key in CASES for case in CASES[key]],
)
def test_contract_15_every_layout_learns_as_one_process(differences, key, case):
    _check(differences(key)[case])


@pytest.mark.long
def test_a_layout_in_bf16_learns_as_one_process_up_to_rounding(tmp_path):
    [found] = _differences(2, tmp_path, {"bf16": {"parallel": {}, "dtype": "bfloat16"}}).values()
    assert found["gradients"] <= 1e-2
    assert found["weights"] <= 1e-3
    assert found["same_bits"]


def test_sizes_that_do_not_fit_the_number_of_processes_are_named():
    for options, size, named in (
        ({"fsdp": 2}, 1, "fsdp=2, tensor=1 need a multiple of 2 processes, and there are 1"),
        ({"tensor": 2}, 3, "fsdp=None, tensor=2 need a multiple of 2 processes, and there are 3"),
        ({"fsdp": 2, "tensor": 2}, 2, "need a multiple of 4 processes"),
        ({"expert": 3}, 2, "learner.parallel.expert=3 must divide fsdp x tensor = 2"),
        ({"tensor": 4, "expert": 2}, 4, "multiple of tensor = 4"),
    ):
        with pytest.raises(ValueError, match=re.escape(named)):
            ParallelOptions(**options).shares(size)


V2 = DeepseekV2Config(moe_intermediate_size=16)  # by its plan one projection is split in two kinds of parts
THREE = Qwen2Config(num_attention_heads=6, num_key_value_heads=3)


@pytest.mark.parametrize(
    ("options", "shape", "targets", "named"),
    [
        ({"tensor": 3}, SHAPE, None, "learner.parallel.tensor=3 does not divide the width of an expert, 16"),
        ({"tensor": 8}, SHAPE, None, "leaves each rank 2 of an expert's 16 units, which must be a multiple of 4"),
        ({"expert": 3}, SHAPE, None, "learner.parallel.expert=3 does not divide this model's 4 routed experts"),
        ({"tensor": 2, "expert": 4}, SHAPE, [], None),
        ({}, SHAPE, [], None),
        ({"tensor": 2}, V2, ["kv_a_proj_with_mqa"], "tensor=2 splits some of lora.targets .* know, .'mla_kv_a_proj'"),
        ({"tensor": 2}, V2, ["o_proj"], None),
        ({"tensor": 2}, THREE, None, "does not divide this model's 3 key/value heads"),
        ({"expert": 2}, Qwen2Config(), None, "expert=2 needs a model with routed experts"),
        ({"expert": 2}, Qwen3MoeConfig(num_experts=4), None, None),
        ({"expert": 3}, Qwen3MoeConfig(num_experts=4), None, "expert=3 does not divide this model's 4 routed experts"),
        ({"expert": 2}, JetMoeConfig(), None, "expert=2 has no plan in transformers for a model of type 'jetmoe'"),
        ({"tensor": 2}, GPT2Config(), None, "tensor=2 has no plan in transformers for a model of type 'gpt2'"),
    ],
)
def test_what_a_layout_cannot_do_is_named_before_a_model_is_loaded(options, shape, targets, named):
    lora = None if targets is None else LoraOptions(targets=targets or None)
    with pytest.raises(ValueError, match=named) if named else nullcontext():
        refuse_layout(ParallelOptions(**options), shape, lora)


# ---- whole runs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(run_words):
    """`run(folder, reward=...)`: the words of a small run behind `python -m grpo`."""
    few = {"sft.steps": 2, "sft.batch_size": 4, "learner.learning_rate": 1e-4}

    def words(folder: Path, command: str = "train", **given: object) -> list[str]:
        slow = few if command == "train" else {"prompts_per_step": 4}
        return run_words(folder, command, **slow | given)

    return words


def _until_a_step_after(step: int, folder: Path) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if (folder / "metrics.jsonl").exists() and len(read_metrics(folder)) > step:
            return
        time.sleep(0.05)
    raise AssertionError(f"no step after {step}")


def _weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return checkpoint.load(folder / f"checkpoints/step_{step:06d}").tensors["policy"]


@pytest.mark.long
def test_a_run_of_two_ranks_through_accelerate_is_that_of_one(run, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    subprocess.run([sys.executable, *run(one)], check=True, capture_output=True)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launcher += ["--main_process_port", str(random.randrange(20000, 32000))]
    done = subprocess.run([*launcher, *run(two)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("learning in 2 processes on cpu") == 1
    assert done.stdout.count("step     1  reward") == 1, "rank 0 alone logs"
    assert done.stdout.count("SFT stage    2/2") == 1
    assert [line["step"] for line in read_metrics(two)] == [1, 2]
    for step in (1, 2):
        tokens = [[line["token_ids"] for line in read_rollouts(folder, step)] for folder in (one, two)]
        assert tokens[0] == tokens[1]
        first, second = _weights(one, step), _weights(two, step)
        for name, tensor in first.items():
            assert torch.allclose(tensor, second[name], rtol=1e-3, atol=2e-5), name


@pytest.mark.long
def test_supervised_fine_tuning_of_two_ranks_is_that_of_one(run, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    given = {"rewards": "[{function: gsm8k}]", "steps": 3}
    subprocess.run([sys.executable, *run(one, command="sft", **given)], check=True, capture_output=True)
    ended = end_of(start_ranks(run(two, command="sft", **given)))
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert ended[1][1:] == ("", "")
    for name, tensor in _weights(one, 3).items():
        assert torch.allclose(tensor, _weights(two, 3)[name], rtol=1e-3, atol=2e-5), name


LATE = """
def late(completions, trainer_state, **_):
    if trainer_state.global_step >= 1:
        raise ValueError('this reward fails late')
    return [float(len(completion)) for completion in completions]
"""


@pytest.mark.slow
def test_a_failure_of_rank_0_ends_every_rank_with_its_message_and_saves_the_last_whole_step(run, tmp_path):
    """Every rank learns of it at the same point, so together they can still save what was learned."""
    (tmp_path / "own.py").write_text(LATE)
    given = {"steps": 3, "checkpoint.every": 100, "sft.steps": 0}
    ended = end_of(start_ranks(run(tmp_path / "r", reward=f"{tmp_path / 'own.py'}:late", **given)))
    assert [code for code, _, _ in ended] == [1, 1], ended
    assert ended[1][2].startswith("quartet: rank 0 failed: RewardFailed:")
    for _, _, shown in ended:
        assert "this reward fails late" in shown
        assert "Traceback" not in shown
    assert list(checkpoint.saved(tmp_path / "r/checkpoints")) == [1]


@pytest.mark.long
@pytest.mark.parametrize(
    ("size", "given", "said"),
    [
        (2, {"prompts_per_step": 99}, "prompts_per_step=99, but there are"),
        (3, {}, "FSDP cannot spread 4 experts over 3 ranks, since one would get none"),
    ],
)
def test_a_refusal_ends_every_rank(run, tmp_path, size, given, said):
    ended = end_of(start_ranks(run(tmp_path / "r", **given), size=size))
    assert [code for code, _, _ in ended] == [1] * size
    assert all(said in shown for _, _, shown in ended)


@pytest.mark.long
def test_what_rank_0_meets_alone_is_told_by_every_rank(run, tmp_path):
    """Here a folder that holds a run: only rank 0 looks at it, while the others wait in their next exchange."""
    shutil.copytree(HERE / "run_0.2.0/run", tmp_path / "r")
    ended = end_of(start_ranks(run(tmp_path / "r"), size=3))
    assert [code for code, _, _ in ended] == [1, 1, 1]
    assert "already holds a run; choose another output_dir" in ended[0][2]
    for _, _, said in ended[1:]:
        assert said.startswith("quartet: rank 0 failed: FileExistsError: output_dir=")
        assert "already holds a run; choose another output_dir" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "victim"), [("raise", 0), pytest.param("raise", 2, marks=pytest.mark.long), ("kill", 1)]
)
def test_a_rank_that_fails_inside_a_step_is_named_on_every_other_one(how, victim):
    processes = start_ranks([str(HERE / "failing_ranks.py"), how, str(victim)], size=3)
    for rank, (_, said, _) in enumerate(end_of(processes)):
        if rank != victim and how == "raise":
            assert f"RankFailed: rank {victim} failed: KeyError: 'of one rank'" in said
        elif rank != victim:
            assert f"RankFailed: rank {victim} (process {processes[victim].pid}) is gone without a word" in said
        else:
            assert said.splitlines()[1 if rank == 0 else 0 :] == (["KeyError: 'of one rank'"] if how == "raise" else [])


CANNOT_WRITE = """
import os, resource, runpy, sys
if os.environ["RANK"] == "1":  # which writes nothing but its files of checkpoints
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
sys.argv = ["quartet", *sys.argv[1:]]
runpy.run_module("grpo", run_name="__main__")
"""


@pytest.mark.long
def test_a_rank_that_cannot_write_its_part_of_a_checkpoint_ends_the_run_on_all(run, tmp_path):
    folder = tmp_path / "r"
    ended = end_of(start_ranks(["-c", CANNOT_WRITE, *run(folder, **{"sft.steps": 0})[2:]]))
    assert [code for code, _, _ in ended] == [1, 1], ended
    said = r"quartet: cannot write checkpoint \S+step_000001: rank 1 of 2: .*00002-of-00002.safetensors'; needs"
    for _, _, shown in ended:
        assert re.match(said, shown), shown
    assert not list((folder / "checkpoints").iterdir())
    [failed] = [event for event in read_events(folder) if event["event"] == "failed"]
    assert failed["saved_step"] == 0
    done = end_of(start_ranks([*run(folder, **{"sft.steps": 0}), "--resume", "auto"]))
    assert [code for code, _, _ in done] == [0, 0], done


@pytest.mark.slow
def test_sigterm_to_every_rank_saves_and_ends_all_of_them(run, tmp_path):
    folder = tmp_path / "r"
    processes = start_ranks(run(folder, steps=100000, **{"checkpoint.every": 100000}))
    _until_a_step_after(0, folder)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    ended = end_of(processes)
    assert ended[0][0] == 143
    last = read_metrics(folder)[-1]["step"]
    assert f"stopped after step {last}; go on with --resume auto" in ended[0][2]
    assert list(checkpoint.saved(folder / "checkpoints")) == [last]
    assert (ended[1][0], ended[1][2]) == (143, ended[0][2])


STOPS = """
import os, runpy, signal, sys
import grpo.session, grpo.steps.pool
from rollout.cost_table import Workload

def costs(run, task, pool, *_):
    os.kill(os.getpid(), signal.SIGTERM)
    pool.use_costs(None, Workload(1))

def opened(policy, options):
    os.kill(os.getpid(), signal.SIGTERM)
    options.check_stop()

if sys.argv[1] == "measuring":  # rank 0 alone calls either of them
    grpo.session.use_costs_of_run = costs
else:
    grpo.steps.pool.open_pool = opened
sys.argv = ["quartet", *sys.argv[2:]]
runpy.run_module("grpo", run_name="__main__")
"""


@pytest.mark.long
@pytest.mark.parametrize("moment", [pytest.param("measuring", marks=pytest.mark.long), "opening"])
def test_a_stop_before_the_first_step_ends_every_rank_alike(run, tmp_path, moment):
    """Rank 0 tells the others, or they wait for it inside a publication."""
    ended = end_of(start_ranks(["-c", STOPS, moment, *run(tmp_path / "r", **{"sft.steps": 0})[2:]]))
    said = "quartet: stopped before step 1; go on with --resume auto\n"
    assert [(code, errors) for code, _, errors in ended] == [(143, said)] * 2


@pytest.mark.long
def test_ranks_killed_at_ten_moments_end_the_others_by_name_and_the_run_goes_on(run, tmp_path):
    """Steps and saves take turns of a few hundredths of a second here, so some of the moments are in a save."""
    folder, noise = tmp_path / "r", random.Random(0)
    for moment in range(10):
        before = len(read_metrics(folder)) if moment else 0
        processes = start_ranks(run(folder, steps=100000) + (["--resume", "auto"] if moment else []))
        victim = noise.randrange(2)
        _until_a_step_after(before + 1, folder)  # it goes on from the last checkpoint
        time.sleep(noise.random())
        processes[victim].kill()
        ended = end_of(processes, timeout=30)
        for rank, (code, _, said) in enumerate(ended):
            if rank != victim:
                assert code == 1
                assert f"rank {victim} (process {processes[victim].pid}) is gone" in said, said
        assert checkpoint.load(checkpoint.newest(folder / "checkpoints")).step >= before


@pytest.mark.long
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_run_of_two_ranks_resumes_on_any_number(run, tmp_path, size):
    """The curve goes on: the same steps as of a run that was never interrupted, within rounding; on two the same
    bits."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for words, ranks, code in (
        (run(whole, steps=4), 2, 0),
        ([*run(parts, steps=4), "--stop_after", "2"], 2, 143),
        ([*run(parts, steps=4), "--resume", "auto"], size, 0),
    ):
        ended = end_of(start_ranks(words, ranks))
        assert [each for each, _, _ in ended] == [code] * ranks, ended
    assert [line["step"] for line in read_metrics(parts)] == [1, 2, 3, 4]
    close = {"rtol": 0, "atol": 0} if size == 2 else {"rtol": 1e-3, "atol": 2e-5}
    for name, tensor in _weights(whole, 4).items():
        torch.testing.assert_close(_weights(parts, 4)[name], tensor, **close)


@pytest.mark.long
def test_128_experts_each_split_in_8_learn_as_one_process(tmp_path):
    """And the bytes that ranks exchange are those of the formula: see `exchanged` in many_ranks.py."""
    shape = {"n_routed_experts": 128, "moe_intermediate_size": 32, "num_hidden_layers": 2}
    case = {"parallel": {"tensor": 8}, "shape": shape, "steps": 1, "count_bytes": True}
    [found] = _differences(8, tmp_path, {"128 in 8": case}).values()
    _check(found)
    assert found["bytes"] == found["formula"]

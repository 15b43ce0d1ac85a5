"""Processes that share a GPU, and what is recommended where they do not fit."""

from __future__ import annotations

import re

import pytest

from grpo.cli.commands import machine
from grpo.cli.commands.machine import LessMemory
from grpo.cli.commands.memory import MemoryOfRun
from grpo.cli.commands.memory_table import DeviceMemory, on_devices
from grpo.cli.parse import main
from grpo.config.run import SftConfig, TrainConfig
from rewards.config.options import load
from rollout.backends.vllm.settings import KV_CACHE_BYTES

ANY = float("inf")


def options(kind: type = TrainConfig, **given):
    return load(kind, None, {"output_dir": "x", **given})


def placed(ranks: int, workers: int, gpus: float = ANY, **given) -> list[tuple[str, int, int]]:
    """(name, how many, GiB while sampling) of devices, where a learner holds 10 and a worker 3."""
    learner = DeviceMemory(f"each of {ranks} ranks", ranks, weights=10)
    worker = DeviceMemory("a worker", workers, sampler=2, rollout=1)
    config = options(**{"rollout.workers": workers} | given)
    return [(it.name, it.count, it.phases["sampling"]) for it in on_devices(learner, worker, config, gpus)]


@pytest.mark.parametrize(
    ("ranks", "workers", "gpus", "given", "expected"),
    [  # GPUs of their own as Ray packs them
        (2, 4, ANY, {}, [("each of 2 ranks", 2, 10), ("each of 4 workers", 4, 3)]),
        (1, 1, ANY, {}, [("each of 1 ranks", 1, 10), ("the worker", 1, 3)]),
        (2, 4, 0, {}, [("each of 2 ranks", 2, 10), ("a worker", 4, 3)]),  # on CPUs
        # beside a learner, where there are no others
        (16, 16, 16, {}, [("each of 16 ranks and worker, in turn", 16, 13)]),
        (2, 1, 2, {}, [("one rank and worker, in turn", 1, 13), ("the other rank", 1, 10)]),
        (1, 1, 1, {}, [("learner and worker, in turn", 1, 13)]),
        (1, 1, 2, {}, [("each of 1 ranks", 1, 10), ("the worker", 1, 3)]),
        # by Ray each rank has a whole GPU, and the workers others
        (2, 5, 2, {"learner.workers": 2}, [("each of 2 ranks", 2, 10), ("each of 5 workers", 5, 3)]),
        (1, 1, 1, {"rollout.ahead": 1}, [("each of 1 ranks", 1, 10), ("a worker, on CPUs", 1, 3)]),
    ],
)
def test_where_workers_are(ranks, workers, gpus, given, expected):
    assert placed(ranks, workers, gpus, **given) == expected


def test_who_is_away_holds_nothing_while_the_learner_works():
    learner = DeviceMemory("a", weights=10, activations=7)
    worker = DeviceMemory("b", sampler=4, derived=2, rollout=3)
    both = learner.beside(worker, "both", in_turn=True)
    assert (both.phases["sampling"], both.phases["learning"], both.phases["saving"]) == (19, 17, 16)
    assert learner.beside(worker, "both", in_turn=False).phases["learning"] == 23


def test_a_plan_of_workers_beside_a_learner_is_the_sum_of_both(random_policy):
    shape, given = random_policy().config, {"rollout.workers": 1}
    [both] = MemoryOfRun(shape, True, options(**given)).devices(1)
    learner, worker = MemoryOfRun(shape, True, options(**given)).devices(2)
    assert both.phases["sampling"] == learner.phases["sampling"] + worker.phases["sampling"]
    assert both.phases["learning"] == learner.phases["learning"]
    assert both.host == learner.host + worker.host
    assert worker.host == learner.host > 0


def test_what_else_was_in_no_plan(random_policy):
    """vLLM, whose copy is its own."""
    shape = random_policy().config
    [own], [vllm] = (MemoryOfRun(shape, True, options(**more)).devices() for more in ({}, {"rollout.backend": "vllm"}))
    assert own.sampler == 0 < vllm.sampler
    assert vllm.rollout == KV_CACHE_BYTES
    [elsewhere] = MemoryOfRun(
        shape, True, options(**{"rollout.backend": "vllm", "rollout.vllm.url": "http://a:1"})
    ).devices()
    assert elsewhere.sampler == elsewhere.rollout == 0


def test_vllm_has_a_gpu_of_its_own_where_there_is_one_and_sleeps_elsewhere(random_policy):
    memory = MemoryOfRun(random_policy().config, True, options(**{"rollout.backend": "vllm"}))
    assert [device.name for device in memory.devices(2)] == ["learner", "vLLM"]
    [both] = memory.devices(1)
    assert both.in_turn
    ahead = {"rollout.backend": "vllm", "rollout.ahead": 1}
    [both] = MemoryOfRun(random_policy().config, True, options(**ahead)).devices(1)
    assert not both.in_turn


def advice(shape, config, gib: float, gpus: float = ANY) -> str:
    there = machine.Memory("memory", gib * machine.GIB, gib * machine.GIB, gpus)
    search = LessMemory(config, lambda other: there.used(MemoryOfRun(shape, True, other).devices(gpus)), gpus)
    return search.words()


def recommended(said: str) -> dict[str, str]:
    return dict(re.findall(r"([a-z_.]+): ([\w.]+)", said))


def test_what_is_recommended_makes_it_fit_and_is_not_set_yet(random_policy):
    shape = random_policy(hidden_size=128).config
    set_already = {"learner.gradient_checkpointing": True, "dtype": "bfloat16", "rollout.workers": 1}
    config = options(**set_already, **{"learner.tokens_per_micro_batch": 8192})
    there = machine.Memory("", machine.GIB, 0, ANY)
    full = there.used(MemoryOfRun(shape, True, config).devices(ANY)) * (1 - machine.SPARE)  # GiB
    said = advice(shape, config, full)  # a fifth too little
    assert said.startswith("it fits with ")
    assert not recommended(said).keys() & set_already.keys()
    for key, value in recommended(said).items():
        changed = load(TrainConfig, None, {"output_dir": "x", **set_already, key: value})
        size = there.used(MemoryOfRun(shape, True, changed).devices(ANY)) * (1 - machine.SPARE)
        assert size <= full * (1 - machine.SPARE), key


@pytest.mark.slow
def test_what_fits_only_together_is_named_together_and_what_cannot_fit_is_said(random_policy):
    shape = random_policy(hidden_size=128).config
    config = options(**{"rollout.workers": 1, "rollout.max_completion_tokens": 64})
    several = advice(shape, config, 0.18)
    assert several.endswith(" together")
    assert len(recommended(several)) > 1
    least = advice(shape, config, 1e-6)
    assert least.startswith("no option makes it fit, even with ")
    assert least.endswith("use larger devices or a smaller model")
    on_cpus = advice(shape, config, 0.9, gpus=0)  # two processes
    assert "learner.workers" not in on_cpus


def test_a_supervised_run_has_no_samplers_and_nothing_in_main_memory_besides_its_learner(random_policy):
    shape, config = random_policy().config, options(SftConfig)
    assert MemoryOfRun(shape, True, config).devices()[0].host == 0
    assert "rollout.workers" not in advice(shape, config, 1e-6)


@pytest.mark.parametrize(("gib", "code"), [pytest.param(16, 0, marks=pytest.mark.slow), (0.01, 1)])
def test_a_run_that_does_not_fit_has_an_exit_code(micro_config, tmp_path, capsys, gib, code):
    config = micro_config(tmp_path / "r")
    words = ["train", "--model", config.model, "--output_dir", str(tmp_path / "r"), "--data.task_options.levels", "[1]"]
    words += ["--rollout.max_completion_tokens", "16"]
    assert main([*words, "--dry_run", "--device_gib", str(gib)]) == code
    shown = capsys.readouterr().out
    assert ("DOES NOT FIT" in shown) == bool(code)
    assert "main memory: about" in shown

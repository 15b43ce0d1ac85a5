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


def test_workers_have_gpus_of_their_own_as_ray_packs_them():
    assert placed(2, 4) == [("each of 2 ranks", 2, 10), ("each of 4 workers", 4, 3)]
    halves = {"rollout.gpus_per_worker": 0.5}
    assert placed(2, 4, **halves) == [("each of 2 ranks", 2, 10), ("each of 2 GPUs of 2 workers", 2, 6)]
    assert placed(1, 1, **halves)[1] == ("the worker", 1, 3)
    assert placed(2, 4, gpus=0, **halves) == [("each of 2 ranks", 2, 10), ("a worker", 4, 3)]  # on CPUs
    assert placed(1, 2, **{"rollout.gpus_per_worker": 0})[1] == ("a worker, on CPUs", 2, 3)


def test_colocated_workers_are_beside_a_learner():
    turns = {"rollout.colocate": True}
    assert placed(16, 16, **turns) == [("each of 16 ranks and worker, in turn", 16, 13)]
    thirds = turns | {"rollout.gpus_per_worker": 1 / 3}
    assert placed(2, 3, **thirds) == [("one rank and 3 workers, in turn", 1, 19), ("the other rank", 1, 10)]
    by_ray = turns | {"learner.workers": 2, "rollout.gpus_per_worker": 0.3}  # a rank leaves .3 of its GPU
    assert placed(2, 5, **by_ray) == [("each of 2 ranks and worker, in turn", 2, 13), ("the GPU of 3 workers", 1, 9)]


def test_where_there_is_no_other_gpu_they_take_turns_and_with_ahead_workers_have_none():
    assert placed(1, 1, gpus=1) == [("learner and worker, in turn", 1, 13)]
    assert placed(1, 1, gpus=2) == [("each of 1 ranks", 1, 10), ("the worker", 1, 3)]
    assert placed(1, 1, gpus=1, **{"rollout.ahead": 1})[1] == ("a worker, on CPUs", 1, 3)


def test_who_is_away_holds_nothing_while_the_learner_works():
    learner = DeviceMemory("a", weights=10, activations=7)
    worker = DeviceMemory("b", sampler=4, derived=2, graphs=1, rollout=3)
    both = learner.beside(worker, 1, "both", in_turn=True)
    assert (both.phases["sampling"], both.phases["learning"], both.phases["saving"]) == (20, 17, 17)
    assert learner.beside(worker, 1, "both", in_turn=False).phases["learning"] == 24


def test_a_plan_of_colocated_workers_is_the_sum_of_both(random_policy):
    shape = random_policy().config
    given = {"learner.workers": 4, "rollout.workers": 4, "rollout.gpus_per_worker": 0.4}
    [both] = MemoryOfRun(shape, True, options(**given, **{"rollout.colocate": True})).devices(ANY)
    learner, worker = MemoryOfRun(shape, True, options(**given | {"rollout.gpus_per_worker": 1.0})).devices(ANY)
    assert both.phases["sampling"] == learner.phases["sampling"] + worker.phases["sampling"]
    assert both.phases["learning"] == learner.phases["learning"]
    assert both.host == learner.host + worker.host
    assert worker.host > learner.host > 0  # a worker is built whole, a rank reads its shares


def test_what_else_was_in_no_plan(random_policy):
    """Recorded graphs, shards that wait in main memory, and vLLM, whose copy is its own."""
    shape = random_policy().config
    graphs = {
        compile: MemoryOfRun(shape, True, options(**{"rollout.compile": compile})).devices(ANY)[0].graphs
        for compile in ("auto", "on")
    }
    assert graphs["auto"] == 0 < graphs["on"]
    assert MemoryOfRun(shape, True, options(**{"rollout.compile": "on"})).devices(0)[0].graphs == 0
    spread = {"learner.parallel.fsdp": 2, "rollout.workers": 1}
    rank, _ = MemoryOfRun(shape, True, options(**spread)).devices(ANY)
    away, _ = MemoryOfRun(shape, True, options(**spread, **{"learner.parallel.fsdp_cpu_offload": True})).devices(ANY)
    assert (away.weights, away.moments, away.activations) == (0, 0, rank.activations)
    assert away.host - rank.host == rank.weights + rank.gradients + rank.moments
    [own], [vllm] = (MemoryOfRun(shape, True, options(**more)).devices() for more in ({}, {"rollout.backend": "vllm"}))
    assert own.sampler == 0 < vllm.sampler
    assert vllm.rollout == KV_CACHE_BYTES
    [elsewhere] = MemoryOfRun(
        shape, True, options(**{"rollout.backend": "vllm", "rollout.vllm.url": "http://a:1"})
    ).devices()
    assert elsewhere.sampler == elsewhere.rollout == 0


def test_a_supervised_run_that_offloads_holds_its_moments_in_main_memory(random_policy):
    """As a run of `train` does; on a CPU there is nothing beside what the learner holds."""
    shape, spread = random_policy().config, {"learner.parallel.fsdp": 2}
    [rank] = MemoryOfRun(shape, True, options(SftConfig, **spread)).devices(ANY)
    [away] = MemoryOfRun(
        shape, True, options(SftConfig, **spread, **{"learner.parallel.fsdp_cpu_offload": True})
    ).devices(ANY)
    assert (away.weights, away.moments, away.activations) == (0, 0, rank.activations)
    assert away.host - rank.host == rank.weights + rank.gradients + rank.moments
    assert MemoryOfRun(shape, True, options(SftConfig)).devices()[0].host == 0


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
    assert "colocate" not in on_cpus


def test_a_supervised_run_gets_no_advice_about_samplers(random_policy):
    config = options(SftConfig)
    assert "rollout.workers" not in advice(random_policy().config, config, 1e-6)


@pytest.mark.parametrize(("gib", "code"), [pytest.param(16, 0, marks=pytest.mark.slow), (0.01, 1)])
def test_a_run_that_does_not_fit_has_an_exit_code(micro_config, tmp_path, capsys, gib, code):
    config = micro_config(tmp_path / "r")
    words = ["train", "--model", config.model, "--output_dir", str(tmp_path / "r"), "--data.task_options.levels", "[1]"]
    words += ["--rollout.max_completion_tokens", "16"]
    assert main([*words, "--dry_run", "--device_gib", str(gib)]) == code
    shown = capsys.readouterr().out
    assert ("DOES NOT FIT" in shown) == bool(code)
    assert "main memory: about" in shown

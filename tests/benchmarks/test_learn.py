"""The bench of sample efficiency: its figures by hand, and its contenders."""

import doctest
import importlib
from math import sqrt

import pytest
import torch

from benchmarks.learn import __main__ as bench
from benchmarks.learn import figures, page, run
from benchmarks.learn.contenders import NAMES
from benchmarks.learn.tasks import TASKS, Task, config_of
from grpo.session import Session
from grpo.task import task as tasks


def test_doctests():
    options = doctest.ELLIPSIS
    assert doctest.testmod(page).failed == 0
    assert doctest.testmod(figures, optionflags=options).failed == 0


def test_a_rising_curve_is_the_nearest_one_by_squares():
    assert figures.rising([3.0, 1.0, 2.0]) == [2.0, 2.0, 2.0]  # 3 and 1 make 2, which does not exceed 2
    assert figures.rising([1.0, 4.0, 1.0, 1.0]) == [1.0, 2.0, 2.0, 2.0]


def test_a_lucky_evaluation_does_not_count_as_reached():
    assert figures.needed([0, 1, 2, 3], [0.5, 0.8, 0.5, 0.8], 0.75) == pytest.approx(2 + 0.10 / 0.15)
    assert figures.needed([0, 1, 2], [0.5, 0.6, 0.7], 0.75) is None
    assert figures.needed([5, 6], [0.8, 0.9], 0.75) == 5.0


def test_accuracy_at_a_budget_ends_with_the_curve():
    assert figures.at([0, 10], [0.5, 0.7], 5) == pytest.approx(0.6)
    assert figures.at([0, 10], [0.5, 0.7], 50) == 0.7


def test_an_interval_of_five_seeds():
    """1 … 5: mean 3, standard deviation √2.5, t = 2.776: 2.776 · √2.5 / √5 = 1.963."""
    mean, half = figures.interval([1, 2, 3, 4, 5])
    assert (mean, half) == (3, pytest.approx(2.776 * sqrt(2.5) / sqrt(5)))


@pytest.mark.parametrize("name", TASKS)
def test_a_task_has_held_out_problems_for_the_search_and_for_what_counts(name, tmp_path):
    if name == "spelling":
        pytest.importorskip("reasoning_gym")
    task = TASKS[name]
    config = config_of(task, tmp_path / "run", **{"eval.limit": 2 * task.held_out})
    assert len(tasks.Task.of(config, model_known=False).held_out) == 2 * task.held_out


@pytest.mark.parametrize("name", TASKS)
def test_every_run_ends_with_the_same_decay(name, tmp_path):
    """The page says so of all of them. A file of examples/ may have another schedule."""
    assert config_of(TASKS[name], tmp_path / "run").learner.schedule == "linear"


def test_the_search_answers_other_problems_than_those_that_count(micro_config, micro_preset, monkeypatch):
    task = Task("words", "", "", steps=(1, 2), held_out=3)
    answered = []

    def evaluate(pool, of_task, prompts, ways, at_once, progress):
        answered.append([prompt.prompt_id for prompt in prompts])
        assert {way: (of.temperature, of.group_size) for way, of in ways.items()} == {
            "sampled": (1, 2),
            "greedy": (0, 1),
        }
        return evaluate_ways(pool, of_task, prompts, ways, at_once, progress)

    evaluate_ways = run.evaluate_ways
    monkeypatch.setattr(run, "evaluate_ways", evaluate)
    monkeypatch.setattr(run, "config_of", lambda task, folder, **options: micro_config(folder, **options))
    monkeypatch.setattr(run, "rate_of", lambda task: 1e-2)
    options = {"seed": 0, "rate": 1.0}
    ends = [
        run.learn(task, "grpo", micro_preset, steps=steps, counts=counts, **options)
        for steps, counts in ((0, True), (2, True), (2, False))
    ]
    assert [end["completions"] for end in ends] == [0, 32, 32]
    assert [end["seconds"] > 0 for end in ends] == [False, True, True]
    assert answered[0] == answered[1]
    assert len(set(answered[1])) == len(set(answered[2])) == 3
    assert not set(answered[1]) & set(answered[2])


def _added(store, runs, **results):
    for one in runs:
        store.add(one, {"sampled": 0.5, "completions": one.steps, **results})


def test_a_seed_that_began_with_another_policy_is_made_anew(tmp_path, monkeypatch):
    """Seed 0 is complete and nobody asks for its policy. Seed 1 lacks a contender, and its policy has changed."""
    store = bench.Store(tmp_path / "learn.json")
    runs = [bench.Run("words", name, seed, 1.0, 60) for seed in (0, 1) for name in ("grpo", "unsure")]
    policies = {0: "none asks", 1: "before"}
    monkeypatch.setattr(bench, "policy_of", lambda run: policies.get(run.seed))
    monkeypatch.setattr(bench, "digest", lambda policy: policy)
    _added(store, runs[:3])
    assert [one.key for one in store.lacks(runs)] == ["words/unsure/1/1/60"]
    policies[1] = "after"
    assert [one.key for one in store.lacks(runs)] == ["words/grpo/1/1/60", "words/unsure/1/1/60"]


def test_the_page_pairs_whole_seeds_from_one_policy(tmp_path, monkeypatch):
    store = bench.Store(tmp_path / "learn.json")
    policies = {0: "a", 1: "b"}
    monkeypatch.setattr(bench, "policy_of", lambda run: policies.get(run.seed))
    monkeypatch.setattr(bench, "digest", lambda policy: policy)
    names = "grpo", "unsure"
    _added(store, [bench.Run("words", name, 10, rate, 60, counts=False) for name in names for rate in bench.RATES])
    _added(store, [bench.Run("words", name, 11, rate, 60, counts=False) for name in names for rate in bench.RATES])
    store.runs["words/unsure/2/10/60"]["sampled"] = 0.75  # the rates of grpo are equal, and the first is taken
    runs = bench.counted(store, "words", names, (0, 1))
    assert [one.key for one in runs[:4]] == [
        "words/grpo/1/0/0",
        *(f"words/{n}/0/15" for n in ("grpo/0.5", "unsure/2")),
        "words/grpo/0.5/0/30",
    ]
    _added(store, runs[:-1])

    def curves():
        return [page.curves_of(list(store.runs.values()), "words", name) for name in names]

    assert [list(of) for of in curves()] == [[0, 1], [0]]
    assert not page.paired(*reversed(curves()))
    _added(store, runs[-1:])
    assert page.paired(*reversed(curves()))
    assert [point["completions"] for point in curves()[1][1]] == [0, 15, 30, 60]
    policies[1] = "another machine's"
    _added(store, runs[-1:])
    assert not page.paired(*reversed(curves()))
    store.runs["words/unsure/2/11/60"]["sampled"] = store.runs["words/unsure/2/10/60"]["sampled"] = 0.25
    bench.counted(store, "words", names, (0, 1))
    assert [list(of) for of in curves()] == [[0, 1], []]  # runs at a rate that the search no longer takes are gone


def test_a_row_says_how_many_completions_reach_what_grpo_has_at_its_end():
    """GRPO: .5, .6, .7, .8 after 0, 10, 20, 40. The contender has .8 after 20 and .9 after 40."""

    def curve(marks):
        of = zip((0, 10, 20, 40), marks, strict=True)
        return [{"completions": c, "seconds": 2 * c, "sampled": mark, "rate": 2.0} for c, mark in of]

    base = {seed: curve((0.5, 0.6, 0.7, 0.8)) for seed in (0, 1)}
    one = {seed: curve((0.5, 0.7, 0.8, 0.9)) for seed in (0, 1)}
    assert page.row("unsure", one, base) == [
        "`unsure`",
        "2 ×",
        "0.900",
        "+0.100 ± 0.000",
        "+0.100 ± 0.000",
        "0.50 ± 0.00",
    ]
    assert page.row("grpo", base, base)[-1] == "1.00 ± 0.00"
    assert page.row("unsure", base, one)[-1] == "not reached by 2 of 2"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_contract_9_a_contender_that_was_stopped_ends_with_the_same_bits(name, micro_config, tmp_path):
    contender = importlib.import_module(f"benchmarks.learn.contenders.{name}")
    options = {**contender.OPTIONS, "prompts_per_step": 4}
    ends = []
    with Session.open(micro_config(tmp_path / "r", steps=4, **options)) as session:
        for _ in range(2):
            for step in session.run.steps():
                if step == 3 and not ends:
                    path = session.save(tmp_path / "middle")
                run.learned(session, contender, step)
            ends.append({name: p.detach().clone() for name, p in session.policy.named_parameters()})
            session.load(path)
            session.run.start = 2
    assert all(torch.equal(ends[0][name], p) for name, p in ends[1].items())

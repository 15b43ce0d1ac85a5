"""What the collector hands from one step to the next."""

from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from rich.progress import Progress

from grpo.data.prompts import PromptStream
from grpo.learner.parallel import ONE_PROCESS
from grpo.run.stop import Stopped, signals
from grpo.steps import pool
from grpo.steps.callback import Callback
from grpo.steps.collector import Collector
from grpo.steps.curriculum import Curriculum
from grpo.steps.loop import Run
from grpo.steps.pool import sampling_of_steps
from grpo.train import train
from rewards.data.examples import Example
from rewards.group_score import GroupScore, RewardFailed, RewardFailure
from rewards.records import read_rollouts
from rewards.verdicts import Verdicts
from rollout.draft_stats import head_accepted
from rollout.group import Completion, DraftStats, Prompt, RolloutGroup
from rollout.workers.local_pool import LocalPool


@pytest.fixture
def expected(monkeypatch):
    """`expected[step]`: what the controller was told of the head's drafts when the rollouts of the step began."""
    told, sample = {}, LocalPool.sample

    def noted(pool, prompts, params, *rest):
        told[params.step] = params.head_accepted
        return sample(pool, prompts, params, *rest)

    monkeypatch.setattr(LocalPool, "sample", noted)
    return told


def recorded(folder, step):
    lines = read_rollouts(folder, step)
    return head_accepted(Completion([], [], "", "stop", 0, draft=DraftStats(**line["draft"])) for line in lines)


@pytest.mark.slow
def test_contract_9_what_became_of_the_drafts_of_a_step_is_what_the_next_one_expects(micro_config, tmp_path, expected):
    given = {"steps": 3, "eval.limit": 0, "sft.steps": 0}
    folder = tmp_path / "run"
    train(micro_config(folder, **given))
    shares = [recorded(folder, step) for step in (1, 2)]
    assert all(len(share) == 2 for share in shares)
    assert len(set(shares)) > 1
    assert [expected[step] for step in (1, 2, 3)] == [(), *shares]
    expected.clear()
    train(micro_config(tmp_path / "stopped", **given | {"steps": 2}))
    train(micro_config(tmp_path / "stopped", **given), resume="auto")
    assert [expected[step] for step in (1, 2, 3)] == [(), *shares]


FAILURE = RewardFailure("letters", "a", 0, "raised", "boom")
DRAFTS = (DraftStats(9, [8, 4], [6, 2]), DraftStats(9, [8, 8], [2, 2]))  # of the first draw and of a refill


@pytest.fixture
def by_hand(micro_config, tmp_path, monkeypatch):
    """`by_hand(rewards, names, **options)`: a collector of one prompt a step, and what the curriculum knew of the
    prompts whenever some were taken. `rewards` are those of the two completions, by draw; a completion without one has
    failed. Its log has `events`, the `bars` that samplers saw and the steps that the task has `reached`."""

    def build(rewards, names=("a",), **given) -> tuple[Collector, list[dict[str, float]]]:
        config = micro_config(tmp_path / "run", **{"prompts_per_step": 1} | given)
        progress, log = Progress(disable=True), SimpleNamespace(events=[], bars=[], reached=[])

        def sample(prompts, params, on_finished):
            on_finished(1)
            log.bars.append([(bar.description, bar.completed, bar.total) for bar in progress.tasks])
            drafts = [replace(DRAFTS[params.draw], target_forwards=count) for count in (8, 4 + 4 * params.draw)]
            completions = [Completion([5], [-1.0], str(params.draw), "stop", 0, draft=draft) for draft in drafts]
            return [RolloutGroup(prompt, completions) for prompt in prompts]

        def score(groups):
            each = [rewards[int(group.texts[0])] for group in groups]
            errors = [FAILURE] * (None in each[0])
            return [GroupScore(list(marks), {"right": list(marks)}, errors) for marks in each]

        examples = [Example(name, f"{name}?", name) for name in names]
        task = SimpleNamespace(
            train=examples,
            unsolved=examples,
            first_reward="right",
            actor=SimpleNamespace(environment=None),
            reached=log.reached.append,
            verdicts=Verdicts("right", "undeclared", gold=1.0),
            prompt=lambda example, tokenizer: Prompt(example.example_id, "", [1] * len(example.example_id)),
            score=score,
        )
        log.progress, log.event = lambda: progress, lambda *kind, **facts: log.events.append((*kind, facts))
        curriculum = Curriculum(SimpleNamespace(config=config), task)
        policy = SimpleNamespace(
            tokenizer=None,
            mtp=None,
            stop_token_ids=[],
            backend="native",
            device=torch.device("cpu"),
            trunk=torch.nn.Module(),
        )
        run = Run(config, log, ONE_PROCESS, saved=None, last=3)
        sampling = sampling_of_steps(run, task, policy)
        collector = Collector(run, task, policy, sampling, PromptStream(task.train), [curriculum])
        collector.pool = SimpleNamespace(sample=sample)
        return collector

    return build


def test_a_refilled_step_counts_all_that_was_drawn(by_hand, monkeypatch):
    """Drafts of groups that were replaced count too. Only a first draw has whole shards: one of 8 and 4 forwards."""
    refill = {"rollout.max_resamples": 1}
    collector = by_hand([[1.0, None], [1.0, 0.0]], ("a", "b"), **refill)
    drawn, log = collector.collect(3), collector.run.log
    assert (len(drawn.groups), drawn.refilled) == (1, 1)
    assert (drawn.replaced[0][0].prompt.prompt_id, drawn.groups[0].prompt.prompt_id) == ("b", "a")
    assert collector.head_accepted == (0.5, 0.6667)  # 8/16, and then 4/12 over 8/16
    assert (drawn.metrics["group/drawn"], drawn.metrics["rollout/tail"], collector.backend) == (2, 0.5, "native")
    assert log.bars == [[("step 3: sampling", 1, 4)], [("step 3: resample 1", 1, 4)]]
    assert log.reached == [2], "the step before has learned"
    assert log.events == [("reward_error", {"step": 3, **vars(FAILURE)})]
    monkeypatch.setattr(signals, "check", Mock(side_effect=Stopped))
    with pytest.raises(Stopped):
        collector.collect(4)


def test_the_first_callback_that_chooses_has_its_problems_and_what_the_reward_cannot_do_is_an_event(by_hand):
    collector = by_hand([], ("a", "bbb", "cc"))
    chooser, draws, failed = Callback(), [], RewardFailed("boom", FAILURE)
    chooser.choose_prompts = lambda count, step, draw: draws.append(draw) or collector.task.train[-count:]
    collector.callbacks = [Callback(), chooser, Callback()]
    assert ([prompt.prompt_id for prompt in collector.prompts(1, step=1)], draws) == (["cc"], [0])
    assert collector.prompt("bbb").prompt_id == "bbb"
    collector.task.score = Mock(side_effect=failed)
    with pytest.raises(RewardFailed):
        collector.score([], 1)
    assert collector.run.log.events == [("reward_error", {"step": 1, **vars(FAILURE)})]


@pytest.mark.parametrize(
    ("routed", "size", "rounds"),
    [
        (True, 4, 2 * 3 * 6),
        (True, 5, 0),
        (False, 4, 2 * 3 * 6),
        (False, 5, 2 * 2 * 6),
        (False, 16, 2 * 6),
        (False, 17, 0),
    ],
)  # nine prompts are three shards of four
def test_graphs_are_planned_for_few_rows(by_hand, monkeypatch, routed, size, rounds):
    monkeypatch.setattr(pool, "has_routers", lambda trunk: routed)
    monkeypatch.setattr("grpo.task.sampling.FEWEST_ROUNDS", 1)
    monkeypatch.setenv("CXX", "true")
    given = {"prompts_per_shard": size, "group_size": 2, "max_completion_tokens": 6}
    rollout = {f"rollout.{name}": value for name, value in given.items()}
    collector = by_hand([], ("a", "bbb", "cc"), steps=2, prompts_per_step=9, **rollout)
    assert collector.run.log.events == ([("graphs", {"planned_rounds": rounds})] if rounds else [])


@pytest.mark.parametrize("replay", [False, True])
def test_no_graphs_are_planned_where_experts_are_recorded(by_hand, monkeypatch, replay):
    monkeypatch.setenv("CXX", "true")
    options = {"steps": 300_000, "rollout.prompts_per_shard": 4, "rollout.group_size": 2}
    collector = by_hand([], ("a", "bbb", "cc"), **options, **{"learner.routing_replay": replay})
    assert [name for name, _ in collector.run.log.events] == ([] if replay else ["graphs"])


def test_a_step_that_is_put_back_leaves_nothing(by_hand, capsys):
    options = {"curriculum.shortest_share": 0.5, "rollout.staleness": 1}
    collector = by_hand([[1.0, 0.0]], **options)
    collector.collect(1, quiet=True)
    assert (collector.run.log.bars, capsys.readouterr().out) == ([[]], ""), "quiet draws no bars"
    collector.stream.take_examples(1)
    before, snapshot = collector.state_dict(), collector.snapshot()
    collector.collect(2, quiet=True)
    collector.stream.take_examples(1)
    assert collector.state_dict() != before
    collector.put_back(snapshot)
    assert collector.state_dict() == before
    assert before["head_accepted"] == [0.75, 0.6667]  # 12/16, and then 4/8 over that
    other = by_hand([], **options)
    other.load_state_dict(before)
    assert other.state_dict() == before

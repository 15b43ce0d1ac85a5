import importlib
import re
from pathlib import Path

import pytest

from grpo.run.metrics import rollout_metrics, tail_share
from review.readers.run_folder import check, documented, meaning
from rewards.group_score import GroupScore, RewardFailure
from rollout.group import Completion, DraftStats, Prompt, RolloutGroup

ROOT = Path(__file__).parents[3]
SOURCES = [path for package in ("grpo", "rollout", "review", "policies") for path in (ROOT / package).rglob("*.py")]


def _completion(tokens: int, reason: str, draft: DraftStats) -> Completion:
    return Completion(list(range(tokens)), [-0.5] * tokens, "x", reason, policy_version=0, draft=draft)


def _score(rewards, errors=(), metrics=None, dropped=False, **parts) -> GroupScore:
    return GroupScore(rewards, parts, list(errors), metrics=metrics or {}, dropped=dropped)


def test_rollout_metrics_by_hand():
    prompt = Prompt("p", "2 + 2 =", [1, 2])
    groups = [
        RolloutGroup(
            prompt,
            [
                # a first token, then (1 + 2) + (1 + 1) in 2 forwards
                _completion(6, "stop", DraftStats(2, drafted=[2, 2], accepted=[2, 1])),
                # a first token, then (1 + 0) + (1 + 1) + 1 in 3 forwards, one of them without a draft
                _completion(5, "length", DraftStats(3, drafted=[2], accepted=[1], fallbacks=1)),
            ],
        ),
        RolloutGroup(prompt, [_completion(1, "abort", DraftStats(0)), _completion(4, "stop", DraftStats(3))]),
        RolloutGroup(prompt, [_completion(2, "stop", DraftStats(1)), _completion(2, "stop", DraftStats(1))]),
    ]
    failure = RewardFailure("exact", "p", 0, "raised", "boom")
    scores = [
        _score([1.0, 0.0], exact=[1.0, 0.0], form=[None, 0.5], metrics={"retries": 2.0}),
        _score([None, 0.5], errors=[failure], dropped=True, exact=[None, 0.5], metrics={"retries": 4.0}),
        _score([0.25, 0.25], exact=[0.25, 0.25]),
    ]
    assert rollout_metrics(groups, scores) == {
        "reward/mean": pytest.approx(2.0 / 5),
        "reward/std": pytest.approx(0.5 / 3),  # 0.5, 0 (one score), 0
        "reward/abstained": pytest.approx(1 / 6),
        "reward/errors": 1,
        "reward/part/exact": pytest.approx(2.0 / 5),
        "reward/part/form": 0.5,
        "reward/metric/retries": 3.0,
        "group/zero_variance": pytest.approx(2 / 3),
        "group/dropped": 1,
        "completion/tokens": 20,
        "completion/length_mean": pytest.approx(20 / 6),
        "completion/length_max": 6,
        "completion/truncated": pytest.approx(1 / 6),
        "completion/aborted": pytest.approx(1 / 6),
        "draft/tokens_per_forward": pytest.approx(14 / 10),
        "draft/fallback_rate": pytest.approx(1 / 10),
        "draft/drafted_depth_1": 4,
        "draft/acceptance_depth_1": 0.75,
        "draft/drafted_depth_2": 2,
        "draft/acceptance_depth_2": 0.5,
        "policy/entropy": 0.5,  # every log-probability is -0.5
    }


def test_plain_decoding_is_one_token_per_forward_and_has_no_acceptance():
    group = RolloutGroup(Prompt("p", "", [1]), [_completion(n, "stop", DraftStats(n - 1)) for n in (3, 5)])
    metrics = rollout_metrics([group], [_score([None, None])])
    assert metrics["draft/tokens_per_forward"] == 1
    assert metrics["reward/abstained"] == metrics["group/zero_variance"] == 1
    assert not {"reward/mean", "reward/std"} & metrics.keys()
    assert not [name for name in metrics if "depth" in name or "gain" in name]
    group.completions[0].draft.cost, group.completions[0].draft.plain_cost = 20.0, 25.0
    group.completions[1].draft.cost, group.completions[1].draft.plain_cost = 20.0, 35.0
    assert rollout_metrics([group], [_score([None, None])])["draft/gain"] == 1.5


def test_documented_names():
    assert check("reward/mean") == "reward/mean"
    assert check("reward/part/gsm8k format") == "reward/part/<name>"
    assert check("draft/acceptance_depth_12") == "draft/acceptance_depth_<d>"
    assert meaning("heads/load_min") == documented()["heads/<name>"]
    for pattern in documented():
        assert check(pattern.replace("<d>", "1").replace("<name>", "x")) == pattern
    for name, nearest in {
        "reward/meen": "reward/mean",
        "draft/acceptance_depth_x": "draft/acceptance_depth_<d>",
        "": "",
    }.items():
        with pytest.raises(ValueError, match=f"{name}' is not documented; did you mean '{nearest}"):
            check(name)
        assert meaning(name) == ""


def test_every_metric_that_the_code_names_is_documented():
    areas = "|".join({name.partition("/")[0] for name in documented()})
    literal = re.compile(rf'"((?:{areas})/[a-z0-9_/]+[a-z0-9])"')
    sources = [path for path in SOURCES if path.name != "old_metrics.py"]
    names = {name for path in sources for name in literal.findall(path.read_text())}
    assert len(names) > 20
    for name in names:
        check(name)


def test_what_is_read_of_a_file_is_what_it_has_when_it_is_imported_and_no_row_is_there_twice():
    files = [path for path in SOURCES if "\nMETRICS = " in path.read_text()]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]
    rows = [row for name in names for row in importlib.import_module(name).METRICS.items()]
    assert sorted(rows) == sorted(documented().items())
    areas = [name.partition("/")[0] for name in documented()]
    assert areas == sorted(areas, key=areas.index)


def test_the_tail_of_a_shard_by_hand():
    """Eight completions, so that one makes the tail: it alone is decoded in 12 of its 16 forwards, in 0 of 4 next."""

    def group(*forwards: int) -> RolloutGroup:
        return RolloutGroup(
            Prompt("p", "", [1]),
            [Completion([1], [0.0], "", "stop", 0, DraftStats(target_forwards=n)) for n in forwards],
        )

    first, second = (group(4, 4, 1, 4), group(4, 4, 4, 16)), (group(4, 3, 2, 1), group(4, 4, 4, 4))
    assert tail_share(first, 2) == {"rollout/tail": 0.75}
    assert tail_share(first + second, 2) == {"rollout/tail": 0.375}
    assert tail_share([group(0, 0)], 1) == {}  # with one token each nothing was decoded after the prefill

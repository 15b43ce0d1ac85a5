"""Alarms: the moments against numpy, every kind on made-up rollouts that show it, and silence on honest ones."""

import math
import random
import re
from dataclasses import replace

import numpy as np
import pytest

from grpo.train import train
from review.findings.alarms import (
    FEATURES,
    LEAST_Z,
    LIMITS,
    SAID,
    WINDOW,
    Alarms,
    Moments,
    Step,
    Watched,
    _examples,
    identical,
    judged,
    look,
    repeated,
    values_of,
)
from review.readers.run_folder import read_events, read_metrics

WORDS = [f"w{i}" for i in range(200)]


def test_the_correlation_inside_groups_is_numpys_of_centred_values():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(6, 4)) + 10 * rng.normal(size=(6, 1)), rng.normal(size=(6, 4))
    y[2] = 7.0  # a tied group tells nothing
    total = sum((Moments.of(list(zip(a, b, strict=True))) for a, b in zip(x, y, strict=True)), Moments())
    centred = [(v - v.mean(1, keepdims=True)).ravel() for v in (x, y)]
    assert total.r == pytest.approx(np.corrcoef(*centred)[0, 1])
    assert total.groups == 5
    assert Moments.of([(1.0, 3.0), (2.0, 3.0)]).r is None
    assert Moments.of([]).r is None
    small = Moments.of([(0.1, 0.1), (0.2, 0.2)])
    assert (small.groups, small.r) == (1, pytest.approx(1.0))


@pytest.mark.parametrize(("ids", "share"), [([], 0.0), ([1, 2], 0.0), ([5] * 5, 2 / 3), ([1, 2, 3, 4, 1, 2, 3], 1 / 5)])
def test_repeated_ngrams_are_those_that_the_penalty_counts(ids, share):
    from rewards.built_in.length import repetition_penalty

    assert repeated(ids) == pytest.approx(share)
    assert repetition_penalty(None, [""], [ids]) == [pytest.approx(-share)]
    assert repeated([5] * 9000) == 1 - 1 / 2046, "of 2,048 tokens"


@pytest.mark.parametrize(
    ("text", "copied", "formed", "right"),
    [
        ("so #### 42", 0.0, True, 1.0),
        ("so 42", 0.0, False, 1.0),
        ("#### 6", 1.0, True, 0.0),
        ("#### 1,200.0", 1.0, True, 0.0),
        ("\\boxed{5}", 0.0, True, 0.0),
        ("nothing", 0.0, False, 0.0),
    ],
)
def test_what_is_seen_of_a_completion(text, copied, formed, right):
    seen = Watched.of("p", "6 boxes of 7 at $1,200?", "6 * 7 = 42\n#### 42", text, [1], {})
    assert (seen.copied, seen.formed, seen.correct) == (copied, formed, right)
    assert Watched.of("p", "6 * 7 of 42?", None, "#### 42", [1], {}).copied == 1.0
    assert Watched.of("p", "42 of 6?", "#### 42", "#### 42", [1], {}).copied == 0.0
    assert Watched.of("p", "6 * 7?", "no number", "#### 42", [1], {}).correct is None


def rollouts(pay, seed=0, skill=0.5, steps=WINDOW, formed=1.0):
    """`steps` steps of 16 groups of 8: answers right with probability `skill`, else of the question or another one."""
    rng = random.Random(seed)
    for step in range(steps):
        groups = []
        for p in range(16):
            gold, copied = rng.randint(100, 900), rng.randint(2, 9)
            group = []
            for _ in range(8):
                answer = gold if rng.random() < skill else rng.choice([copied, rng.randint(901, 999)])
                ids = [rng.randrange(500) for _ in range(rng.randint(10, 40))]
                ids += ids[-4:] * rng.randint(0, 5)
                mark = "#### " if rng.random() < formed else ""
                text = f"{' '.join(rng.choices(WORDS, k=5))} {mark}{answer}"
                seen = Watched.of(f"{step}-{p}", f"{copied} and {gold + 3}?", f"#### {gold}", text, ids, {})
                group.append(Watched(**vars(seen) | {"marks": {"mine": pay(seen, rng)}}))
            groups.append(group)
        yield groups


def noisy(value, rng):
    return value + 0.1 * rng.random()


HONEST = {
    "right": lambda seen, rng: seen.correct,
    "right, in the right form": lambda seen, rng: float(seen.correct and seen.formed),
    "right, and a little for shortness": lambda seen, rng: seen.correct - 0.002 * seen.length,
    "right, and a fifth for the form": lambda seen, rng: seen.correct + 0.2 * seen.formed,
    "right nine times of ten": lambda seen, rng: seen.correct if rng.random() < 0.9 else 1 - seen.correct,
}
HACKED = {
    "length": lambda seen, rng: min(seen.length / 60, 1.0),
    "repetition": lambda seen, rng: noisy(seen.repetition, rng),
    "copied": lambda seen, rng: max(seen.copied, 0.2 * seen.correct),
    "format": lambda seen, rng: float(seen.formed),
}


def value_of(alarm):
    """The number in its evidence."""
    number = re.search(r"[+-]?[0-9.]+%?", alarm.evidence)[0]
    return float(number[:-1]) / 100 if number.endswith("%") else float(number)


def given(pay, **options):
    watch, found = Alarms(["mine"]), []
    for groups in rollouts(pay, **options):
        found += watch.observe(groups)
    return watch, found


@pytest.mark.parametrize("kind", HACKED)
@pytest.mark.parametrize("seed", range(2))
def test_a_hacked_reward_is_named_once_with_examples(kind, seed):
    watch, found = given(HACKED[kind], seed=seed, steps=2 * WINDOW, formed=0.9)
    [alarm] = found
    assert alarm.kind == SAID[kind][0]
    assert alarm.evidence.startswith("the reward mine ")
    assert abs(value_of(alarm)) >= LIMITS[kind]
    assert len({example.place for example in alarm.where}) == 3
    assert alarm.where[0].mark >= alarm.where[-1].mark > 0
    assert f"alarm/{kind}/mine" in watch.values


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_reward_raises_no_alarm(name):
    for seed, skill in enumerate((0.1, 0.5, 0.95)):
        assert given(HONEST[name], seed=seed, skill=skill)[1] == []


def noise(seen, rng):
    return "".join(rng.choices("0123456789 #=+-abc", k=rng.randint(1, 40)))


def numbers(seen, rng):
    return f"#### {rng.randint(2, 999)}"


def one_number(seen, rng):
    return "#### 7"


def last_words(seen, rng):
    return "done"


# What a policy that has learned nothing writes, what it is paid for that, and the shape of the run.
UNTRAINED = {
    "all rewards 0, of random tokens": (noise, lambda seen, rng: 0.0, {}),
    "all rewards 0, nothing is written": (lambda seen, rng: "", lambda seen, rng: 0.0, {}),
    "all rewards equal, above 0": (numbers, lambda seen, rng: 0.5, {}),
    "all rewards 1, one text for all": (one_number, lambda seen, rng: 1.0, {}),
    "a reward of the form that nobody gets": (noise, lambda seen, rng: float("<answer>" in seen.text), {}),
    "a penalty that hardly ever fires": (one_number, lambda seen, rng: -float(rng.random() < 0.01), {}),
    "NaN": (numbers, lambda seen, rng: rng.choice([math.nan, 0.0]), {}),
    "it abstains from half": (numbers, lambda seen, rng: rng.choice([None, 0.0]), {}),
    "groups of 2, by chance": (numbers, lambda seen, rng: float(rng.random() < 0.3), {"size": 2, "prompts": 6}),
    "groups of 2, a judge's noise": (noise, lambda seen, rng: rng.random(), {"size": 2, "prompts": 4}),
    "one prompt a step": (numbers, lambda seen, rng: rng.random(), {"prompts": 1}),
    "a short run": (numbers, lambda seen, rng: seen.length / 60, {"steps": WINDOW - 1}),
    "now and then right by chance": (numbers, lambda seen, rng: seen.correct, {}),
    "one number that is rarely right": (one_number, lambda seen, rng: float(rng.random() < 0.02), {}),
    "right, and a fifth for the form": (
        lambda seen, rng: numbers(seen, rng) if rng.random() < 0.5 else noise(seen, rng),
        lambda seen, rng: seen.correct + 0.2 * seen.formed,
        {},
    ),
    "one word, and an environment's reward": (last_words, lambda seen, rng: float(rng.random() < 0.9), {"turns": 3}),
}


def untrained(write, pay, seed, prompts=16, size=8, steps=2 * WINDOW, turns=1):
    rng = random.Random(seed)
    for step in range(steps):
        groups = []
        for p in range(prompts):
            gold, group = rng.randint(100, 900), []
            for _ in range(size):
                ids = [rng.randrange(500) for _ in range(rng.randint(1, 40))]
                text = write(None, rng)
                seen = Watched.of(f"{step}-{p}", f"{rng.randint(2, 9)} and 7?", f"#### {gold}", text, ids, {}, turns)
                group.append(replace(seen, marks={"mine": pay(seen, rng)}))
            groups.append(group)
        yield groups


@pytest.mark.parametrize("name", UNTRAINED)
def test_a_run_that_has_learned_nothing_raises_no_alarm(name):
    write, pay, shape = UNTRAINED[name]
    for seed in range(3):
        watch = Alarms(["mine"])
        for groups in untrained(write, pay, seed, **shape):
            assert watch.observe(groups) == []
            assert all(map(math.isfinite, watch.values.values()))


def test_the_score_of_a_length_penalty_and_no_right_answer_raises_no_alarm():
    """Length is all that its score differs by, and it is paid for on purpose."""
    watch = Alarms(["gsm8k", "score"])
    for groups in rollouts(lambda seen, rng: 0.0, skill=0.0, steps=2 * WINDOW):
        scored = [
            [replace(s, marks={"gsm8k": s.correct, "score": s.correct - s.length / 99}) for s in g] for g in groups
        ]
        assert watch.observe(scored) == []
        assert watch.values["alarm/length/score"] == pytest.approx(-1.0)


def test_one_group_with_large_differences_is_no_correlation():
    """Rewards differ by a hundredth in ten groups, by 1 in another one, where the long completion got it."""
    small = [Moments.of([(rank, 0.01 * (rank % 2)) for rank in range(8)]) for _ in range(10)]
    large = Moments.of([(100.0 * (rank == 0), float(rank == 0)) for rank in range(8)])
    total = sum(small, large)
    assert total.r > LIMITS["length"]
    assert total.groups == 11
    assert total.z < LEAST_Z


def test_an_honest_yes_or_no_is_not_the_same_text_for_different_questions():
    """Each of the two answers is right for many questions; a reward that pays "yes" for all of them is named."""

    def kinds(pay):
        watch, found, rng = Alarms(["mine"]), [], random.Random(0)
        for step in range(2 * WINDOW):
            groups = []
            for p in range(16):
                gold, group = rng.choice(["yes", "no"]), []
                for _ in range(8):
                    text = gold if rng.random() < 0.95 else "yes"
                    marks = {"mine": pay(text, gold)}
                    group.append(Watched.of(f"{step}-{p}", "Is it?", gold, text, [rng.randrange(500)], marks))
                groups.append(group)
            found += watch.observe(groups)
        return [alarm.kind for alarm in found]

    assert kinds(lambda text, gold: float(text == gold)) == []
    assert kinds(lambda text, gold: float(text == "yes")) == ["identical-rewarded"]


def test_a_policy_that_nearly_always_has_the_form_shows_what_is_paid_in_five_groups():
    """As the demo's policy does: one of 128 completions a step has another form, and a fifth are wrong."""
    watch, found = Alarms(["mine"]), []
    for groups in rollouts(lambda seen, rng: 1.0, skill=0.8, steps=WINDOW):
        other = replace(groups[0][0], formed=False, correct=0.0, marks={"mine": 0.0})
        found += watch.observe([[other, *groups[0][1:]], *groups[1:]])
    assert [alarm.kind for alarm in found] == ["form-rewarded"]


def test_an_alarm_waits_for_a_whole_window_and_enough_groups():
    assert given(HACKED["length"], steps=WINDOW - 1)[1] == []
    watch, steps = Alarms(["mine"]), list(rollouts(HACKED["length"]))
    assert [watch.observe(groups[:1]) for groups in steps] == [[]] * WINDOW
    assert watch.values["alarm/length/mine"] == values_of([look(steps[-1][:1], "mine")], 1)["length"]
    assert ["length" in values_of([look(steps[-1][:count], "mine")]) for count in (9, 10)] == [False, True]


def test_what_has_no_mark_or_no_gold_answer_does_not_count():
    [groups] = rollouts(HACKED["format"], steps=1)
    unknown, unmarked = Watched(**vars(groups[0][0]) | {"correct": None}), Watched(**vars(groups[0][1]) | {"marks": {}})
    step = look([[unknown, unmarked]], "mine")
    assert (step.best, step.formed, step.moments["length"].groups) == (0, 0, 0)
    watch = Alarms(["mine"])
    assert watch.observe([[unmarked]]) == []
    assert watch._means == []
    watch.observe([[unknown, unmarked]])
    assert watch._means == [1.0]
    none = dict.fromkeys(FEATURES, Moments())
    assert values_of([Step(none, best=9, wrong=3, formed_best=9, formed=10)]) == {"format": 1 / 3}
    assert values_of([Step(none, best=1, wrong=1, formed_best=0, formed=0)]) == {}


def test_examples_have_the_highest_marks_and_then_the_most_of_the_feature():
    def seen(name, mark, length, right):
        return Watched(name[0], name, length, 0.0, 0.0, True, right, {"mine": mark})

    groups = [[seen("a2", 1, 3, 1), seen("a1", 1, 5, 0)], [], [seen("b1", 2, 9, 1), seen("b2", None, 1, 0)]]
    texts = [
        [example.text for example in _examples(kind, "mine", value, groups)]
        for kind, value in (("length", 0.9), ("length", -0.9), ("format", 0.9))
    ]
    assert texts == [["b1", "a1"], ["b1", "a2"], ["b1", "a1"]]


def test_of_the_features_beyond_their_limits_the_strongest_names_the_alarm():
    assert judged({"length": -0.95, "repetition": 0.6}) == "length"
    assert judged({"length": 0.6, "repetition": 0.55}) is None  # length explains more, and not enough
    assert judged({"copied": 0.7, "correct": 0.71}) is None
    assert judged({"format": LIMITS["format"], "correct": 0.2}) == "format"
    assert judged({}) is None
    assert (judged({"length": LIMITS["length"]}), judged({"copied": 0.7, "correct": 0.7})) == ("length", None)


def test_a_reward_for_the_form_is_one_that_every_well_formed_completion_gets():
    [groups] = rollouts(HACKED["format"], steps=1, formed=0.9, skill=0.25)
    step = look(groups, "mine")
    flat = [seen for group in groups for seen in group]
    assert (step.best, step.formed) == (sum(seen.formed for seen in flat),) * 2
    wrong = [seen for seen in flat if seen.formed and not seen.correct]
    assert values_of([step])["format"] == pytest.approx(len(wrong) / step.best)
    [groups] = rollouts(HONEST["right"], steps=1)
    assert "format" not in values_of([look(groups, "mine")])


def test_the_same_text_for_different_questions_is_an_alarm():
    def stuck(groups):
        return [[Watched(**vars(seen) | {"text": " #### 7"}) for seen in group[:4]] + group[4:] for group in groups]

    watch, found = Alarms(["mine"]), []
    for groups in rollouts(lambda seen, rng: rng.random()):
        assert found == []
        found += watch.observe(stuck(groups))
    assert [(alarm.kind, value_of(alarm)) for alarm in found] == [("identical-rewarded", 0.5)]
    watch.observe(groups)
    assert watch.values["alarm/identical"] == 0.0
    assert identical(groups) == 0.0
    assert identical([groups[0][:1], [Watched(**vars(groups[0][0]) | {"prompt_id": "other"}), *groups[1][:2]]]) == 0.5
    same = [[Watched(**vars(groups[0][0])) for _ in range(8)]]  # inside a group it is a policy that is sure
    assert identical(same) == 0.0


@pytest.mark.parametrize(
    ("before", "after", "rises", "every", "sounds"),
    [
        *[(0.6, 0.4, True, every, True) for every in (1, 3, WINDOW + 2)],
        *[(0.6, 0.4, False, 1, False), (0.6, 0.57, True, 1, False), (0.4, 0.6, True, 1, False)],
    ],
)
def test_a_reward_that_rises_while_held_out_accuracy_falls(before, after, rises, every, sounds):
    """Once, however often the run evaluates."""
    watch, found, last = Alarms(["mine"]), [], WINDOW + 2
    assert watch.evaluated(before, 128) == []
    for step, groups in enumerate(rollouts(lambda seen, rng: seen.correct, steps=last), start=1):
        level = step / 10 if rises else -step / 10
        watch.observe([[replace(s, marks={"mine": s.correct + level}) for s in group] for group in groups])
        if step == last or step % every == 0:
            found += watch.evaluated(before + (after - before) * step / last, 128)
    assert [alarm.kind for alarm in found] == (["held-out-falls"] if sounds else [])
    if every == last:  # 0.2 over the root of (0.24 + 0.24) / 128
        assert value_of(found[0]) == round(0.2 / (0.48 / 128) ** 0.5, 1)


def test_a_fall_of_two_standard_errors_since_an_earlier_evaluation_sounds():
    """A half less of four completions, where the error is the root of (0 + 1/4) / 4. One lucky step is no rise."""
    rising, lucky = [0.0, 0.1, 0.2, 0.2, 0.3], [0.0, 0.0, 0.0, 0.0, 1.0]
    for means, values in ((rising, [2.0]), (lucky, []), (rising[:4], []), ([1.0], []), ([], [])):
        watch = Alarms(["mine"])
        watch.evaluated(1.0, 4)
        watch._means = means
        assert [value_of(alarm) for alarm in watch.evaluated(0.5, 4)] == values


def test_a_reward_that_does_not_rise_raises_no_held_out_alarm():
    """Evaluations after every step differ by chance, and each is compared with an earlier one."""
    rng = random.Random(0)

    def share(p, count):
        return sum(rng.random() < p for _ in range(count)) / count

    alarms = 0
    for _ in range(50):
        watch = Alarms(["mine"])
        for _ in range(20):
            watch._means.append(share(0.02, 128))
            alarms += len(watch.evaluated(share(0.5, 64), 64))
    assert alarms <= 50 * 0.02


@pytest.mark.slow
def test_an_untrained_run_raises_no_alarm(micro_config, tmp_path):
    """Random weights, the reward of the demo, and an evaluation after every step."""
    options = {"rewards": [{"function": "gsm8k"}], "sft.steps": 0, "eval.every": 1, "eval.limit": 4}
    options |= {"mtp.loss_weight": 0.0, "checkpoint.every": 9, "rollout.draft_tokens": 0}
    train(micro_config(tmp_path / "run", **options, steps=WINDOW + 1))
    assert [event for event in read_events(tmp_path / "run") if event["event"] == "alarm"] == []


@pytest.mark.long
def test_a_run_warns_records_examples_and_measures(micro_config, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "def long(completions, completion_ids, **_):\n    return [len(ids) / 48 for ids in completion_ids]\n"
    )
    reward = {"rewards": [{"function": f"{tmp_path / 'mine.py'}:long"}], "mtp.loss_weight": 0.0}
    options = {"prompts_per_step": 8, "rollout.max_completion_tokens": 48, "sft.steps": 0} | reward
    train(micro_config(tmp_path / "run", **options, steps=WINDOW))
    events = [event for event in read_events(tmp_path / "run") if event["event"] == "alarm"]
    assert [(event["kind"], event["step"]) for event in events] == [("length-rewarded", WINDOW)]
    assert {"place", "text", "mark"} == set(events[0]["where"][0])
    assert "alarm: step=5 said=the reward long follows the length of completions (r = +1.00)" in capsys.readouterr().out
    assert read_metrics(tmp_path / "run")[-1]["alarm/length/long"] == pytest.approx(1.0)

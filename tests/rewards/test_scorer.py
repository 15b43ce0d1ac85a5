"""Scoring: weights, abstention, columns, what a failure means under each policy, and the dry run."""

import asyncio
import hashlib
import math
import pickle
import threading
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest

from rewards import GroupScore, RewardError, RewardFailed, RewardFailure, RewardSpec, Scorer
from rewards.group_score import FailurePolicy, GroupTally
from rewards.registry import load_reward

FILE = Path(__file__).parents[1] / "cases/faulty_rewards.py"


def mine(function: str, **options) -> RewardSpec:
    return RewardSpec(f"{FILE}:{function}", **options)


def chat(function: str) -> RewardSpec:
    return RewardSpec(f"chat:{FILE}:{function}")


def score_one(specs, completions, columns=None, **options) -> GroupScore:
    with Scorer(specs, **options) as scorer:
        return scorer.score(["p"], [completions], [columns or {}], prompt_ids=["a"])[0]


def test_rewards_are_weighted_and_parts_are_not():
    specs = [RewardSpec("gsm8k"), RewardSpec("gsm8k_format", 0.5), mine("asynchronous", weight=-2.0, name="half")]
    with Scorer(specs, columns=["answer"]) as scorer:
        scores = scorer.score(
            ["p", "q"],
            [["#### 42", "#### 41", "42"], ["#### 7"]],
            [{"answer": "#### 42"}, {"answer": "7"}],
            prompt_ids=["a", "b"],
        )
    assert [score.rewards for score in scores] == [[0.5, -0.5, -1.0], [0.5]]
    assert scores[0].parts == {"gsm8k": [1, 0, 0], "gsm8k_format": [1, 1, 0], "half": [0.5, 0.5, 0.5]}
    assert scores[0].errors == []


def test_none_abstains_and_is_left_out_of_the_sum():
    specs = [mine("abstains"), RewardSpec("regex_format", 0.5, arguments={"pattern": "none"})]
    assert score_one(specs, ["none", "x"]).rewards == [0.5, 1.0]
    score = score_one([mine("abstains")], ["none", "x"], on_error="score=0")
    assert (score.rewards, score.errors) == ([None, 1.0], [])


def test_a_reward_that_weighs_nothing_marks_no_completion_on_which_all_others_abstain():
    recorded = RewardSpec("regex_format", 0.0, arguments={"pattern": "none"})
    score = score_one([mine("abstains"), recorded], ["none", "x"])
    assert score.rewards == [None, 1.0]
    assert score.parts["regex_format"] == [1.0, 0.0]
    assert score_one([recorded], ["none", "x"]).rewards == [0.0, 0.0]


FAULTS = {
    "raise": ("raised", "ValueError: boom (faulty_rewards.py:"),
    "exit": ("raised", "SystemExit: 2"),
    "loop": ("timeout", "no result after 0.7 s, stuck at faulty_rewards.py:"),
    "c_hang": ("timeout", "no result after 0.7 s, stuck at faulty_rewards.py:"),
    "sleep": ("timeout", "no result after 0.7 s, stuck at faulty_rewards.py:"),
    "nan": ("nan", "returned nan"),
    "inf": ("inf", "returned inf"),
    "text": ("not_a_number", "returned '1.0'"),
    "die": ("died", "exit code 3"),
    "segfault": ("died", "SIGSEGV"),
    "short": ("wrong_length", "returned 0 rewards for 1 completions"),
}


@pytest.fixture(scope="module")
def scorers():
    """One scorer per policy, which every fault in turn must leave in working order."""
    scorers = {
        on_error: Scorer([mine("faulty"), RewardSpec("length_penalty", arguments={"target": 0, "per_token": 1})],
                         on_error=on_error, timeout_s=0.7)
        for on_error in ("abort", "drop_sample", "drop_group", "score=-3")
    }  # fmt: skip
    yield scorers
    for scorer in scorers.values():
        scorer.close()


def score_faulty(scorer: Scorer, fault: str) -> list[GroupScore]:
    """Two groups; the fifth of the eight completions of the first one is at fault."""
    completions = [["fine"] * 4 + [fault] + ["fine"] * 3, ["fine"] * 2]
    ids = [[[0] * 2 for _ in group] for group in completions]
    return scorer.score(["p", "q"], completions, [{}, {}], prompt_ids=["a", "b"], completion_ids=ids)


@pytest.mark.parametrize(
    "fault", [pytest.param(fault, marks=[pytest.mark.slow] * (fault in ("sleep", "loop"))) for fault in FAULTS]
)
def test_contract_6_a_failure_is_data_never_a_zero(scorers, fault):
    kind, cause = FAULTS[fault]
    score, other = score_faulty(scorers["drop_sample"], fault)
    [failure] = score.errors
    assert (failure.function, failure.prompt_id, failure.sample_index, failure.kind) == ("faulty", "a", 4, kind)
    assert cause in failure.message
    assert score.rewards == [-1.0] * 4 + [None] + [-1.0] * 3
    assert score.parts == {"faulty": [1.0] * 4 + [None] + [1.0] * 3, "length_penalty": [-2.0] * 8}
    assert not score.dropped
    assert other.rewards == [-1.0] * 2
    assert other.errors == []


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(fault, marks=[pytest.mark.slow] * (fault == "loop"))
        for fault in FAULTS
        if fault not in ("sleep", "exit", "c_hang")
    ],
)
def test_contract_6_each_policy_does_what_it_says(scorers, fault):
    score, other = score_faulty(scorers["drop_group"], fault)
    assert score.dropped
    assert score.rewards == [None] * 8
    assert len(score.errors) == 1
    assert not other.dropped
    assert other.rewards == [-1.0] * 2

    score, other = score_faulty(scorers["score=-3"], fault)
    assert score.rewards == [-1.0] * 4 + [-5.0] + [-1.0] * 3
    assert score.parts["faulty"][4] == -3.0
    assert len(score.errors) == 1
    assert other.rewards == [-1.0] * 2

    with pytest.raises(RewardFailed) as caught:
        score_faulty(scorers["abort"], fault)
    message, failure = str(caught.value), caught.value.failure
    assert (failure.function, failure.prompt_id, failure.sample_index, failure.kind) == (
        *("faulty", "a", 4),
        FAULTS[fault][0],
    )
    for part in ("'faulty'", "'a'", "sample 4", FAULTS[fault][0], "reward.on_error", "drop_sample", "drop_group"):
        assert part in message
    assert ("raise reward.timeout_s=0.7" in message) == (FAULTS[fault][0] == "timeout")
    assert score_faulty(scorers["abort"], "fine")[0].rewards == [-1.0] * 8  # and the pool works again


def test_none_is_no_failure_under_any_policy(scorers):
    for scorer in scorers.values():
        score, other = score_faulty(scorer, "none")
        assert score.errors == []
        assert score.parts["faulty"] == [1.0] * 4 + [None] + [1.0] * 3
        assert score.rewards == [-1.0] * 4 + [-2.0] + [-1.0] * 3  # the length penalty alone
        assert other.rewards == [-1.0] * 2


def test_several_failures_are_each_charged_to_their_own(scorers):
    completions = ["raise", "fine", "die", "nan", "fine", "none"]
    ids = [[[0]] * 6]
    [score] = scorers["drop_sample"].score(["p"], [completions], [{}], prompt_ids=["a"], completion_ids=ids)
    assert [(error.sample_index, error.kind) for error in score.errors] == [(0, "raised"), (2, "died"), (3, "nan")]
    assert score.rewards == [None, 0.0, None, None, 0.0, -1.0]


def test_a_batch_that_fails_only_as_a_batch_is_scored_alone_with_a_warning(caplog):
    score = score_one([mine("first_only")], ["1", "22", "333"])
    assert score.rewards == [1.0, 2.0, 3.0]
    assert "failed on a batch (wrong_length: returned 1 rewards for 3 completions)" in caplog.text
    score = score_one([mine("slow_batch")], ["x"] * 4, timeout_s=0.9)
    assert score.rewards == [1.0] * 4
    assert "raise reward.timeout_s=0.9" in caplog.text


def test_combining_with_every_policy_by_hand():
    def tally():
        tally = GroupTally("a", 3, {"f": 2.0, "g": 1.0})
        for sample, value in enumerate([1.0, {"kind": "raised", "message": "boom"}, None]):
            tally.note("f", sample, value)
            tally.note("g", sample, 0.25 * sample if sample else float("inf"))
        return tally

    rewards = {
        name: tally().result(FailurePolicy.parse(name)).rewards for name in ("drop_sample", "drop_group", "score=1")
    }
    assert rewards == {"drop_sample": [None, None, 0.5], "drop_group": [None] * 3, "score=1": [3.0, 2.25, 0.5]}
    first, second = tally().result(FailurePolicy("drop_sample")).errors
    assert first == RewardFailure("g", "a", 0, "inf", "returned inf")
    assert str(second) == "reward 'f' failed on prompt 'a', sample 1: raised: boom"


@pytest.mark.parametrize(
    "on_error", ["", "drop", "abort=1", "score", "score=", "score=x", "score=nan", "score=inf", "score=1e308"]
)
def test_an_unknown_policy_names_the_choices(on_error):
    with pytest.raises(
        RewardError, match=r"reward.on_error='.*' is no policy.* abort, drop_sample, drop_group or score="
    ):
        Scorer([RewardSpec("gsm8k")], on_error=on_error)


@pytest.mark.parametrize(
    ("specs", "options", "message"),
    [
        ([], {}, "no reward is given"),
        ([RewardSpec("gsm8k"), RewardSpec("x.py:gsm8k")], {}, "two rewards are called 'gsm8k'"),
        ([RewardSpec("gsm8k", weight=float("nan"))], {}, "weight=nan must be finite"),
        ([RewardSpec("gsm8k", arguments={"mode": {1, 2}})], {}, "arguments hold a set"),
        ([RewardSpec("gsm8k", arguments={"mod": "strict"})], {}, r"no parameter 'mod' to bind \(did you mean 'mode'"),
        ([RewardSpec("gsm8")], {}, "did you mean 'gsm8k'"),
        ([RewardSpec("gsm8k")], {"timeout_s": 0}, "reward.timeout_s=0 must be"),
        ([RewardSpec("gsm8k")], {"workers": 0}, "workers=0 must be"),
        ([RewardSpec("gsm8k")], {"columns": ["question"]}, "'gsm8k' asks for the column 'answer'.*Columns: question"),
        ([RewardSpec("regex_format")], {"columns": ["answer"]}, r"arguments: \{pattern: ...\}"),
        ([RewardSpec("gsm8k", weight=1e16)], {}, r"weight=1e\+16 must be finite, and between ±1e\+15"),
        (
            [RewardSpec("gsm8k", weight=1e10)],
            {"on_error": "score=1e10"},
            r"'score=1e\+10' times weight=1e\+10 of .* beyond",
        ),
    ],
)
def test_bad_options_are_refused_before_anything_runs(specs, options, message):
    with pytest.raises(RewardError, match=message):
        Scorer(specs, **options)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def grade(:", "'.*mine.py:grade' cannot be loaded: .*SyntaxError"),
        ("import no_such_module", r"No module named 'no_such_module' \(mine.py:1 in <module>\)"),
        ("def grad(completions): ...", "did you mean 'grad'"),
        ("def grade(prompts, /): ...", "positional-only"),
        ("import os; os._exit(5)", r"the process that ran it ended \(exit code 5\)"),
    ],
)
def test_a_file_that_cannot_be_loaded_says_why(tmp_path, source, message):
    (tmp_path / "mine.py").write_text(source)
    with pytest.raises(RewardError, match="(?s)" + message):
        Scorer([RewardSpec(f"{tmp_path / 'mine.py'}:grade")])


def test_everything_that_a_function_asks_for_arrives():
    with Scorer([mine("everything", arguments={"scale": 2.0})], columns=["answer", "bonus"], workers=2) as scorer:
        arguments = (["p", "q"], [["x", "y"], ["z"]], [{"answer": "1", "bonus": 0.5}, {"answer": "1", "bonus": 0}])
        scores = scorer.score(
            *arguments, prompt_ids=["a", "b"], completion_ids=[[[7, 8], [9]], [[]]], trainer_state={"global_step": 3}
        )
        with pytest.raises(RewardError, match=r"asks for completion_ids; pass completion_ids to Scorer.score"):
            scorer.score(*arguments, prompt_ids=["a", "b"], trainer_state={})
    assert [score.rewards for score in scores] == [[5.0, 3.0], [0.0]]
    assert [score.extras for score in scores] == [{"ids": [[7, 8], [9]]}, {"ids": [[]]}]
    assert [score.metrics for score in scores] == [{"step": 3.0}] * 2


def test_columns_may_have_a_value_for_every_completion(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def graded(completions, grade, weight):\n    return [g * w for g, w in zip(grade, weight)]\n"
        "def rest(completions, **columns):\n"
        "    if None in columns['grade']:\n        raise ValueError('no grade')\n"
        "    return columns['grade']\n"
    )
    specs = [RewardSpec(f"{tmp_path / 'mine.py'}:{name}") for name in ("graded", "rest")]
    with Scorer(specs, columns=["weight", "grade"], on_error="drop_sample", workers=2) as scorer:
        arguments = (["p", "q"], [["x", "y"], ["z"]], [{"weight": 2.0, "grade": 9.0}, {"weight": 3.0, "grade": 9.0}])
        scores = scorer.score(
            *arguments, prompt_ids=["a", "b"], completion_columns=[{"grade": [1.0, 0.5]}, {"grade": [0.25]}]
        )
        assert [score.parts for score in scores] == [
            {"graded": [2.0, 1.0], "rest": [1.0, 0.5]},
            {"graded": [0.75], "rest": [0.25]},
        ]
        [score, _] = scorer.score(  # one by one, each keeps its own
            *arguments, prompt_ids=["a", "b"], completion_columns=[{"grade": [None, 0.5]}, {"grade": [0.25]}]
        )
        assert score.parts == {"graded": [None, 1.0], "rest": [None, 0.5]}
        with pytest.raises(RewardError, match="prompt 'a': 1 grade, 2 completions"):
            scorer.score(*arguments, prompt_ids=["a", "b"], completion_columns=[{"grade": [1.0]}, {"grade": [1.0]}])


def test_chat_functions_get_all_messages_of_an_episode():
    """Also where a batch has failed and is scored again one by one. Other functions get the texts."""
    told = {"role": "tool", "name": "t", "content": "4"}
    turns = [[{"role": "assistant", "content": said}, *[told] * i] for i, said in enumerate(["a", "raise", "b"])]
    specs = [chat("messages"), RewardSpec("regex_format", arguments={"pattern": "^x$"})]
    with Scorer(specs, on_error="drop_sample") as scorer:
        [score] = scorer.score(["p"], [["x", "y", "z"]], [{}], prompt_ids=["a"], turns=[turns])
        assert score.parts == {"messages": [1.0, None, 3.0], "regex_format": [1.0, 0.0, 0.0]}
        with pytest.raises(RewardError, match="1 turns, 3 completions"):
            scorer.score(["p"], [["x", "y", "z"]], [{}], prompt_ids=["a"], turns=[turns[:1]])


@pytest.mark.parametrize("on_error", ["abort", "drop_sample", "drop_group", "score=0"])
def test_a_function_that_cannot_be_pickled(on_error):
    with pytest.raises((TypeError, AttributeError, pickle.PicklingError)):
        pickle.dumps(load_reward(f"{FILE}:unpicklable"))
    assert score_one([mine("unpicklable")], ["four", ""], on_error=on_error).rewards == [4.0, 0.0]


def test_an_async_function_is_scored_where_an_event_loop_runs():
    """As in a notebook, without processes."""
    scorer = Scorer([mine("asynchronous")], isolated=False)

    async def cell():
        return scorer.score(["?"], [["a", "b"]], [{}], prompt_ids=["p"])

    [score] = asyncio.run(cell())
    assert score.errors == []
    assert all(isinstance(reward, float) for reward in score.rewards)


TEXT = "\ud800\x00\n#### 42"
NOT_ASKED_FOR = {"image": object(), "mode": "flexible"}  # a column named like an option is no option


@pytest.mark.parametrize(
    ("specs", "completions", "columns", "rewards"),
    [
        ([chat("chat")], ["yes", "no"], {}, [1.0, 0.0]),
        ([mine("optional")], ["x"], {}, [1.0]),  # what is not given keeps its default
        ([mine("optional")], ["x"], {"answer": "none"}, [0.0]),
        ([mine("numbers")], ["x", "y"], {}, [1.0, 2.5]),  # an array
        ([RewardSpec("gsm8k")], ["#### 42", "42"], {"answer": "42"} | NOT_ASKED_FOR, [1.0, 0.0]),
        ([RewardSpec("gsm8k"), mine("unpicklable")], [TEXT], {"answer": "42"}, [1.0 + len(TEXT)]),
    ],
)
def test_what_functions_get_and_give(specs, completions, columns, rewards):
    assert score_one(specs, completions, columns).rewards == rewards


@pytest.mark.parametrize(
    ("spec", "columns", "message"),
    [
        (mine("scalar"), {}, r"wrong_length: returned 1.0, not a list of 1"),
        (RewardSpec("gsm8k"), {"question": "?"}, r"'gsm8k' \(prompt 'a'\) asks for the column 'answer'"),
        (RewardSpec("gsm8k"), {"answer": {1, 2}}, "column 'answer' of prompt 'a' holds a set.* 'gsm8k'"),
        (RewardSpec("gsm8k"), {"answer": {1: "x"}}, "'answer' of prompt 'a' holds a dict with the key 1.* 'gsm8k'"),
        (RewardSpec("gsm8k"), {"answer": [b"x"]}, "column 'answer' of prompt 'a' holds a bytes.* 'gsm8k'"),
    ],
)
def test_what_cannot_be_scored_is_named(spec, columns, message):
    with pytest.raises(RewardError, match=message):
        score_one([spec], ["x"], columns)


@pytest.mark.parametrize("turned", [False, True])
def test_a_column_that_some_rows_have_is_none_for_the_others(tmp_path, turned):
    """Whichever row comes first in a batch."""
    (tmp_path / "hint.py").write_text("def hinted(completions, hint=None): return [float(h == 'x') for h in hint]")
    columns = [{}, {"hint": "x"}][:: -1 if turned else 1]
    with Scorer([RewardSpec(f"{tmp_path}/hint.py:hinted")], columns=["hint"]) as scorer:
        scores = scorer.score(["?", "?"], [["a"], ["b"]], columns, prompt_ids=["p", "q"])
    assert [score.rewards for score in scores] == [[0.0], [1.0]][:: -1 if turned else 1]


def test_lengths_must_agree():
    with Scorer([RewardSpec("gsm8k")]) as scorer:
        with pytest.raises(RewardError, match="have the lengths 2, 1, 1, 1, 2"):
            scorer.score(["p", "q"], [["x"]], [{}], prompt_ids=["a"])
        with pytest.raises(RewardError, match="prompt 'a': 2 completion_ids, 1 completions"):
            scorer.score(["p"], [["x"]], [{}], prompt_ids=["a"], completion_ids=[[[1], [2]]])
        assert scorer.score([], [], [], prompt_ids=[]) == []


def test_dry_run_accepts_and_refuses():
    with Scorer([RewardSpec("gsm8k"), mine("faulty")], on_error="drop_sample", timeout_s=0.7) as scorer:
        assert scorer.dry_run("p", "#### 42", {"answer": "42"}).rewards == [2.0, 2.0]
        for completion, column, message in (
            ("raise", {"answer": "42"}, "'faulty' failed on prompt 'dry run', sample 0: raised: ValueError: boom"),
            ("c_hang", {"answer": "42"}, r"(?s)timeout: .*raise reward.timeout_s=0.7"),
            ("fine", {"answer": "none"}, "'gsm8k' failed .* the gold answer 'none' has no number"),
            ("fine", {"gold": "1"}, "asks for the column 'answer'"),
        ):
            with pytest.raises(RewardError, match=message):
                scorer.dry_run("p", completion, column)
    for specs, message in (
        ([mine("everything"), mine("also_logs_ids")], "'everything' and 'also_logs_ids' both log 'ids'"),
        ([mine("logs_too_few")], r"log_extra\('x'\) got 1 values for 2 completions"),
        ([mine("first_only")], "returned 1 rewards for 2 completions"),  # it serves one completion only
    ):
        with Scorer(specs) as scorer, pytest.raises(RewardError, match=message):
            scorer.dry_run("p", "c", {"answer": "1", "bonus": 1})


def test_describe_names_the_file_and_its_hash():
    specs = [RewardSpec("gsm8k", 2.0), mine("everything", arguments={"scale": 2.0}, name="all")]
    with Scorer(specs) as scorer:
        built_in, own = scorer.describe()
    assert built_in == asdict(specs[0]) | {"name": "gsm8k", "path": None, "sha256": None, "code_sha256": None}
    sha256 = hashlib.sha256(FILE.read_bytes()).hexdigest()
    assert own == asdict(specs[1]) | {"path": str(FILE.resolve()), "sha256": sha256, "code_sha256": own["code_sha256"]}
    assert own["code_sha256"] not in (None, sha256)


SPECS = [RewardSpec("gsm8k"), RewardSpec("gsm8k_format", 0.1), mine("unpicklable", weight=0.01)]
BATCH = [[f"#### {i}" if i % 3 else "none" for i in range(j, j + 8)] for j in range(100)]
COLUMNS = [{"answer": str(j + 2)} for j in range(100)]


def score_many(workers: int, isolated: bool = True) -> list[list[float | None]]:
    with Scorer(SPECS, workers=workers, isolated=isolated) as scorer:
        scores = scorer.score(["p"] * 100, BATCH, COLUMNS, prompt_ids=list(map(str, range(100))))
    return [score.rewards for score in scores]


def test_scores_are_the_same_in_a_thread_with_more_workers_and_without_isolation():
    here = score_many(1)
    assert len({reward for group in here for reward in group}) > 4
    there: list = []
    thread = threading.Thread(target=lambda: there.extend(score_many(2)))
    thread.start()
    thread.join()
    assert there == here == score_many(1, isolated=False)


def test_without_isolation_failures_are_charged_the_same():
    with Scorer([mine("faulty")], isolated=False, on_error="drop_sample") as scorer:
        [score] = scorer.score(["p"], [["fine", "raise", "nan", "none", "short"]], [{}], prompt_ids=["a"])
    assert [(error.sample_index, error.kind) for error in score.errors] == [
        *((1, "raised"), (2, "nan"), (4, "wrong_length"))
    ]
    assert score.rewards == [1.0, None, None, None, None]
    with pytest.raises(RewardFailed), Scorer([mine("faulty")], isolated=False) as scorer:
        scorer.score(["p"], [["fine", "raise"]], [{}], prompt_ids=["a"])
    with pytest.raises(RewardError, match="did you mean 'faulty'"):
        Scorer([mine("fault")], isolated=False)


def huge(tmp_path, value: str, **options) -> RewardSpec:
    file = tmp_path / "huge.py"
    file.write_text(
        f"def grade(completions, **_):\n    return [{value} if c == 'huge' else 1.0 for c in completions]\n"
    )
    return RewardSpec(f"{file}:grade", **options)


@pytest.mark.parametrize(("value", "weight"), [("1e308", 10.0), ("-1e308", 1.0), ("1e200", 0.0), ("1e15", -2.0)])
def test_a_score_that_would_overflow_is_a_failure_of_its_function_and_goes_by_the_policy(tmp_path, value, weight):
    specs = [RewardSpec("regex_format", arguments={"pattern": "x"}), huge(tmp_path, value, weight=weight)]
    score_here = partial(score_one, specs, isolated=False)  # what a number is does not depend on its process
    with pytest.raises(
        RewardFailed, match=r"reward 'grade' failed on prompt 'a', sample 1: too_large: returned"
    ) as end:
        score_one(specs, ["x", "huge"])
    assert "reward.on_error" in str(end.value)
    assert score_here(["x", "huge"], on_error="drop_sample").rewards == [1.0 + weight, None]
    assert score_here(["x", "huge"], on_error="drop_group").dropped
    replaced = score_here(["x", "huge"], on_error="score=-3")
    assert replaced.rewards == [1.0 + weight, -3.0 * weight]
    assert [(error.function, error.sample_index, error.kind) for error in replaced.errors] == [
        ("grade", 1, "too_large")
    ]
    assert score_one([huge(tmp_path, "1e15")], ["huge", "x"]).rewards == [1e15, 1.0]  # is just small enough


def test_logged_numbers_that_overflow_end_no_run():
    tally = GroupTally("a", 1, {"f": 1.0})
    for name, values in {"large": (1e308, 1e308), "both": (math.inf, -math.inf)}.items():
        for value in values:
            tally.note_metric(name, value)
    metrics = tally.result(FailurePolicy("abort")).metrics
    assert metrics["large"] == 1e308
    assert math.isnan(metrics["both"])  # which the log of a run writes as null and counts

"""A judge that answers late, wrongly, with broken JSON and with 429: scores, retries, cost and failures as promised."""

import json
import sqlite3
import threading
from email.utils import formatdate

import pytest

from rewards import RewardError, RewardFailed, RewardSpec, Scorer
from rewards.built_in.judge import judge
from rewards.http_post import Tries, post
from tests.cases.judges import TOKENS, judge_server, verdict

RUBRIC = "{prompt}|{completion}|{answer}"
TOO_MANY = (429, {"Retry-After": "0"}, {})


def ask(server, completions, **options):
    """The scores, and what was logged."""
    logged = {}
    given = {"url": server.url, "model": "m", "rubric": "{completion}", "backoff_s": 0.001}
    given["log_extra"] = logged.__setitem__
    scores = judge(["q"] * len(completions), completions, log_metric=logged.__setitem__, **given | options)
    return scores, logged


def test_a_score_is_what_the_judge_says_of_the_filled_in_rubric():
    with judge_server(lambda asked: verdict(7 if asked == "q|right|4" else 2, "seen")) as server:
        scores, logged = ask(
            server, ["right", [{"role": "assistant", "content": "wrong"}]], rubric=RUBRIC, answer=["4", "5"], highest=10
        )
    assert scores == [7.0, 2.0]
    assert logged["judge_reason"] == ["seen"] * 2
    assert (logged["judge_tokens"], logged["judge_retries"], logged["judge_failed"]) == (TOKENS, 0.0, 0.0)
    [path, headers, body] = server.seen[0]
    assert path == "/v1/chat/completions"
    assert "Authorization" not in headers
    assert (body["model"], body["temperature"]) == ("m", 0)
    assert "from 0 to 10" in body["messages"][0]["content"]
    schema = body["response_format"]["json_schema"]
    assert schema["strict"] is True
    assert schema["schema"]["required"] == ["reason", "score"]
    with judge_server(lambda asked: verdict(10 if asked == "right" else 0)) as server:  # not the column of this name
        assert ask(server, ["right", "wrong"], completion=["right"] * 2, highest=10)[0] == [10.0, 0.0]


@pytest.mark.parametrize(
    "broken",
    [
        verdict("great, 10 of 10"),
        verdict('```json\n{"reason": "r", "score": 1}\n```'),
        verdict('{"score": 1}'),
        verdict('{"reason": "r", "score": 1, "also": 2}'),
        verdict('{"reason": "r", "score": "1"}'),
        verdict('{"reason": "r", "score": true}'),
        verdict('{"reason": "r", "score": NaN}'),
        verdict('{"reason": "r", "score": 1.01}'),
        verdict('{"reason": 1, "score": 1}'),
        verdict("[" * 100_000),
        {"choices": [{"message": {"content": None, "refusal": "no"}}], "usage": {"total_tokens": TOKENS}},
        {"choices": [], "usage": {"total_tokens": TOKENS}},
        ["neither", "this"],
        TOO_MANY,
        (503, {}, {"error": "busy"}),
        (200, {}, 0.15),  # late
    ],
    ids=str,
)
def test_what_is_no_verdict_is_asked_for_again_and_paid_for(broken):
    with judge_server(lambda _: verdict(0.5), {"x": [broken]}) as server:
        scores, logged = ask(server, ["x"], request_timeout_s=0.1 if broken == (200, {}, 0.15) else 5.0)
    assert scores == [0.5]
    assert logged["judge_retries"] == 1.0
    paid = isinstance(broken, dict)
    assert logged["judge_tokens"] == TOKENS * (1 + paid)
    keys = {headers["Idempotency-Key"] for _, headers, _ in server.seen}
    assert len(keys) == (
        2 if isinstance(broken, dict | list) else 1
    )  # a repeat may be answered from the server's memory


def test_one_failure_leaves_the_others_their_scores_and_names_its_cause():
    with judge_server(lambda asked: verdict("no" if asked == "b" else 1.0)) as server:
        scores, logged = ask(server, ["a", "b", "c", "b"], retries=2)
    assert [scores[0], scores[2]] == [1.0, 1.0]
    assert str(scores[1]) == str(scores[3])
    assert "no usable answer after 3 tries: the verdict is no JSON" in str(scores[1])
    assert logged["judge_failed"] == 0.5
    assert len(server.seen) == 1 + 3 + 1  # the same failure is not asked for twice in a batch
    with judge_server(lambda _: (400, {}, {"error": "no such model"})) as server:
        scores, _ = ask(server, ["a"])
    assert "HTTP 400" in str(scores[0])
    assert "no such model" in str(scores[0])
    assert len(server.seen) == 1  # a request that is wrong is not repeated


@pytest.mark.parametrize(
    ("wait", "tries"),
    [("0", 2), (formatdate(0, usegmt=True), 2), ("soon", 2), ("31", 1), (formatdate(4e9, usegmt=True), 1)],
)
def test_the_judge_says_when_to_come_again(wait, tries):
    with judge_server(script={"x": [(429, {"Retry-After": wait}, {})]}) as server:
        scores, _ = ask(server, ["x"])
    assert len(server.seen) == tries
    assert scores == [1.0] if tries == 2 else "asks to wait for" in str(scores[0])


def test_waits_double(monkeypatch):
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)
    with judge_server(lambda _: (500, {}, {})) as server, pytest.raises(RuntimeError, match="after 4 tries: HTTP 500"):
        post(server.url, b'{"messages": [{"content": ""}]}', bytes, Tries(5, 3, 0.5))
    assert waits == [0.5, 1.0, 2.0]


def test_the_key_goes_to_the_judge_and_nowhere_else(monkeypatch, tmp_path):
    monkeypatch.setenv("JUDGE_KEY", "sk-secret")
    elsewhere = (302, {"Location": "http://127.0.0.1:9/"}, {})
    script = {"echo": [(401, {}, {"error": "wrong key sk-secret"})], "moved": [elsewhere]}
    with judge_server(script=script) as server:
        options = {"token_variable": "JUDGE_KEY", "cache": str(tmp_path / "cache")}
        scores, logged = ask(server, ["good", "echo", "moved"], **options)
    assert {headers["Authorization"] for _, headers, _ in server.seen} == {"Bearer sk-secret"}
    assert scores[0] == 1.0
    assert "HTTP 401" in str(scores[1])
    assert "HTTP 302" in str(scores[2])
    assert "wrong key [key]" in str(scores[1])
    assert "sk-secret" not in str(logged)
    assert b"sk-secret" not in (tmp_path / "cache").read_bytes()
    with pytest.raises(ValueError, match="'NO_KEY' is not set"):
        ask(server, ["x"], token_variable="NO_KEY")


def test_250_completions_with_50_texts_cost_50_questions_and_after_a_restart_none(tmp_path):
    texts = [f"completion {i % 50}" for i in range(250)]
    cache = str(tmp_path / "judge.sqlite")
    with judge_server(lambda asked: verdict(int(asked.split()[1]) / 50)) as server:
        scores, logged = ask(server, texts, cache=cache)
        assert len(server.seen) == 50
        again, logged_again = ask(server, texts, cache=cache)
        assert len(server.seen) == 50
        ask(server, texts, cache=cache, model="another")
        assert len(server.seen) == 100
    assert scores == again == [i % 50 / 50 for i in range(250)]
    assert (logged["judge_cached"], logged_again["judge_cached"]) == (0.8, 1.0)
    assert (250 * logged["judge_tokens"], logged_again["judge_tokens"]) == (50 * TOKENS, 0)


def test_as_many_requests_run_at_a_time_as_the_limit_says():
    together, under_way, most = threading.Barrier(4), [], []

    def answer(asked):
        under_way.append(asked)
        together.wait(timeout=10)  # ends only when four are here
        most.append(len(under_way))
        together.wait(timeout=10)
        under_way.remove(asked)
        return verdict(1.0)

    with judge_server(answer) as server:
        scores, _ = ask(server, [str(i) for i in range(12)], concurrency=4)
    assert scores == [1.0] * 12
    assert set(most) == {4}


def test_the_budget_ends_the_questions_but_not_the_kept_verdicts(tmp_path):
    options = {"cache": str(tmp_path / "judge.sqlite"), "concurrency": 1, "budget_tokens": 3 * TOKENS}
    with judge_server() as server:
        scores, _ = ask(server, list("abcde"), **options)
        assert scores[:3] == [1.0] * 3
        assert [str(error) for error in scores[3:]] == [
            "budget_tokens=30 are used up (30 were spent); raise it to go on"
        ] * 2
        assert len(server.seen) == 3
        assert ask(server, list("ca"), **options)[0] == [1.0, 1.0]
        assert "used up" in str(ask(server, ["new"], **options)[0][0])
        assert ask(server, ["new"], **options | {"budget_tokens": 31})[0] == [1.0]
        assert ask(server, ["f"], **options | {"prefix": "other"})[0] == [1.0]  # has a budget of its own
        (tmp_path / "notes.txt").write_text("a list that is longer than a header of SQLite, so that it is read. " * 5)
        with pytest.raises(ValueError, match=r"notes\.txt' cannot be used as the cache"):
            ask(server, ["a"], cache=str(tmp_path / "notes.txt"))
    with judge_server(lambda _: {"choices": [{"message": {"content": '{"reason": "", "score": 1}'}}]}) as server:
        assert "no usage.total_tokens" in str(ask(server, ["a"], budget_tokens=100)[0][0])  # nothing could be counted
        assert ask(server, ["a"])[0] == [1.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"rubric": "{completion} {gold}"},
            r"names \{gold\}, which is no column; there are prompt, completion, answer",
        ),
        ({"rubric": "good?"}, r"does not name \{completion\}"),
        ({"rubric": "{completion.__class__}"}, "which is no column"),
        ({"rubric": '{"score": {completion}'}, r"which is no column|no format string"),
        ({"rubric": "{completion"}, "no format string"),
        ({"lowest": 1, "highest": 1}, "lowest is below highest"),
        ({"concurrency": 0}, "concurrency=0"),
        ({"url": "127.0.0.1"}, "http:// or https://"),
    ],
)
def test_what_cannot_be_used_is_refused_before_a_model_is_loaded(options, message):
    spec = {"url": "http://127.0.0.1:9/v1", "model": "m", "rubric": "{completion}", "retries": 0}
    with (
        Scorer([RewardSpec("judge", arguments=spec | options)], columns=["answer"], isolated=False) as scorer,
        pytest.raises(RewardError, match=message),
    ):
        scorer.dry_run("q", "a", {"answer": "4"})


@pytest.mark.parametrize(
    ("on_error", "rewards"), [("drop_sample", [1.0, None]), ("drop_group", [None, None]), ("score=-1", [1.0, -1.0])]
)
def test_contract_6_a_judges_failure_is_that_of_one_completion(on_error, rewards, monkeypatch, tmp_path):
    """In a worker, with a key that is passed to it by name, and verdicts kept in the folder of the run."""
    monkeypatch.setenv("JUDGE_KEY", "sk-secret")
    with judge_server(lambda asked: verdict("no" if asked == "bad" else 1.0)) as server:
        arguments = {"url": server.url, "model": "m", "rubric": "{completion}", "token_variable": "JUDGE_KEY"}
        spec = RewardSpec("judge", arguments=arguments | {"retries": 1, "backoff_s": 0.001})
        state = {"trainer_state": {"global_step": 0, "output_dir": str(tmp_path)}, "prompt_ids": ["p"]}
        with Scorer([spec], on_error=on_error, columns=[]) as scorer:
            [score] = scorer.score(["q"], [["good", "bad"]], [{}], **state)
            [again] = scorer.score(["q"], [["good", "bad"]], [{}], **state)
        if on_error == "drop_sample":
            with (
                Scorer([spec], columns=[]) as scorer,
                pytest.raises(RewardFailed, match="sample 1: raised: RuntimeError"),
            ):
                scorer.score(["q"], [["good", "bad"]], [{}], **state)
    assert score.rewards == again.rewards == rewards
    assert [(error.sample_index, error.kind) for error in score.errors] == [(1, "raised")]
    assert score.extras["judge_cached"] == [False, False]
    assert again.extras["judge_cached"] == [True, False]
    assert (score.metrics["judge_failed"], score.metrics["judge_tokens"]) == (0.5, 1.5 * TOKENS)
    with sqlite3.connect(tmp_path / "judge.sqlite") as database:
        assert database.execute("select score, reason from verdicts").fetchall() == [(1.0, "because")]
    database.close()
    assert "sk-secret" not in json.dumps(scorer.describe())

"""Cassettes: the same request has the same answer, offline too, and every fault that is put in is somebody's."""

import itertools
import json
import random
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from copies import OF_REWARDS
from judges import judge_server, verdict

from rewards import RewardSpec, Scorer
from rewards.http_post import Tries, Unusable, post
from rewards.isolation.cassette import FAULTS, Exchange, playing, put_in, recorded
from rewards.protocol import RewardError
from rollout.environments import protocol

RUBRIC = "{prompt} {completion}"
TEXTS = [[f"{i}.{k}" for k in range(8)] for i in range(4)]  # of four prompts


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rewards.isolation.pool.subprocess", OF_REWARDS)
        yield


def judged(url, workers=0, **options):
    """Without workers it is asked in this process."""
    arguments = {"url": url, "model": "m", "rubric": RUBRIC, "backoff_s": 0.0, "retries": 0, **options}
    arguments["cache"] = f"{tempfile.mkdtemp()}/verdicts.sqlite"
    how = {"on_error": "drop_sample", "workers": max(workers, 1), "isolated": workers > 0}
    with Scorer([RewardSpec("judge", arguments=arguments)], **how) as scorer:
        names = [f"p{i}" for i in range(len(TEXTS))]
        groups = scorer.score(names, TEXTS, [{}] * len(TEXTS), prompt_ids=names)
    return [replace(group, metrics={}) for group in groups]  # means of batches, which follow from the workers


def by_chance(asked):
    return verdict(random.random())


def test_a_judge_says_the_same_offline_by_any_number_of_workers(tmp_path):
    file = tmp_path / "judge.jsonl"
    with judge_server(by_chance, script={"p0 0.0": [(503, {}, {}), verdict(0.25)]}) as server:
        with playing(file, "record"):
            first = judged(server.url, retries=1, token_variable="PATH")
            assert judged(server.url, retries=1) == first  # what is in it is not asked again
        assert len(server.seen) == 33
    with playing(file):
        assert judged(server.url, retries=1) == judged(server.url, workers=2, retries=1) == first
    assert first[0].rewards[0] == 0.25
    assert first[0].extras["judge_retries"][:2] == [1, 0]
    written = file.read_text()
    assert len(written.splitlines()) == 33
    assert "Bearer" not in written
    about = [json.loads(line) for line in written.splitlines() if '"p0 0.0' in line or "503" in line]
    assert {(line["kind"], line["target"]) for line in about} == {("http", f"{server.url}/chat/completions")}


def test_a_request_that_is_not_in_it_is_named(tmp_path):
    file = tmp_path / "empty.jsonl"
    file.touch()
    with judge_server() as server, playing(file):
        [*groups] = judged(server.url)
        assert server.seen == []
    assert sum(len(group.errors) for group in groups) == 32
    assert "empty.jsonl: it has no answer of http http://127.0.0.1" in groups[0].errors[0].message
    assert "Record it (cassette.mode=record)" in groups[0].errors[0].message
    with pytest.raises(ValueError, match=r"cassette.file=.*none.jsonl: there is no such file; record it first"):
        playing(tmp_path / "none.jsonl").__enter__()
    file.write_text('{"key": "a", "ans')  # of a process that was killed
    with playing(file, "record"):
        assert [Exchange("http", "any", "any").answer(lambda i=i: i) for i in (3, 4)] == [3, 3]
    file.write_text(f"damaged\n{file.read_text()}")
    with playing(file), pytest.raises(RewardError, match="a line is damaged, b'damaged"):
        Exchange("http", "any", "any").find()


@pytest.mark.parametrize("fault", FAULTS)
def test_each_of_fifty_faults_of_a_judge_is_a_failure_of_its_completion(tmp_path, fault):
    """They are fifty with those of tools below. Which ones follows from what is asked."""
    file = tmp_path / "judge.jsonl"
    with judge_server(by_chance) as server:
        with playing(file, "record", {fault: 0.4}):
            groups = judged(server.url)
        reached = len(server.seen)
        with playing(file, "record"):
            whole = judged(server.url)
    failed = [(i, error.sample_index) for i, group in enumerate(groups) for error in group.errors]
    assert 7 <= len(failed) <= 20
    assert reached == 32 - (len(failed) if fault in ("late", "rate_limited") else 0)
    for i, group in enumerate(groups):
        for error in group.errors:
            assert (error.function, error.prompt_id, error.kind) == ("judge", f"p{i}", "raised")
            assert put_in(fault) in error.message
        marks = group.parts["judge"]
        assert [k for k, mark in enumerate(marks) if mark is None] == [error.sample_index for error in group.errors]
        assert all(mark in (None, of_whole) for mark, of_whole in zip(marks, whole[i].parts["judge"], strict=True))
    with playing(file, faults={fault: 0.4}):
        assert judged(server.url) == groups
        again = judged(server.url, retries=8)  # a further try meets its own
    assert [group.rewards for group in again] == [group.rewards for group in whole]
    retried = [extra for group in again for extra in group.extras["judge_retries"]]
    assert [bool(count) for count in retried] == [mark is None for group in groups for mark in group.rewards]


class Pool:
    """Answers requests of episodes with numbers that never come again."""

    def __init__(self):
        self.numbers, self.asked = itertools.count(), []

    def run(self, requests):
        self.asked += requests
        return [
            {
                "observation": None,
                "results": [[str(next(self.numbers)), False] for _ in r["calls"]],
                "done": False,
            }
            for r in requests
        ]


def requests_of(steps=2, prompts=4, samples=4):
    begin = {"environment": "", "columns": {}, "seeds": [0, 0], "history": [], "ends": False, "turns": []}
    names = [f"{step}/0/p{i}/{k}" for step in range(steps) for i in range(prompts) for k in range(samples)]
    return [begin | {"episode": name, "calls": [["find", {"word": "a"}]]} for name in names]


@pytest.mark.parametrize("fault", FAULTS)
def test_each_of_fifty_faults_of_a_tool_is_a_failure_of_its_episode(tmp_path, fault):
    file, pool, requests = tmp_path / "tools.jsonl", Pool(), requests_of()
    with playing(file, "record", {fault: 0.4}):
        replies = protocol.run(pool, requests)
    failed = [reply for reply in replies if "kind" in reply]
    assert 7 <= len(failed) <= 20
    assert {reply["kind"] for reply in failed} == {"timeout" if fault == "late" else "raised"}
    for request, reply in zip(requests, replies, strict=True):
        named = f"{put_in(fault)}: episode {request['episode']}, after 0 calls: find"
        assert reply.get("message", named) == named
    assert len(pool.asked) == 32 - len(failed)
    with playing(file, faults={fault: 0.4}):
        assert protocol.run(None, requests[::-1]) == replies[::-1]
    with playing(file), pytest.raises(RewardError, match=r"episode \d/0/p\d/\d, after 0 calls: find: .*Record it"):
        protocol.run(None, requests)
    beginnings = [request | {"calls": []} for request in requests]
    with playing(file, "record", {fault: 1.0}):
        assert protocol.run(pool, beginnings)[0] == {"observation": None, "results": [], "done": False}


def test_requests_of_episodes_are_apart_and_may_come_in_any_order(tmp_path):
    file, pool, requests = tmp_path / "tools.jsonl", Pool(), requests_of()
    with playing(file, "record"):
        first = protocol.run(pool, requests[:20])
        assert protocol.run(pool, requests)[:20] == first
        assert len(pool.asked) == 32
    random.shuffle(order := list(range(32)))
    with playing(file):
        again = protocol.run(None, [requests[i] for i in order])
    assert [reply["results"][0][0] for _, reply in sorted(zip(order, again, strict=True))] == list(map(str, range(32)))
    assert protocol.run(pool, requests[:1])[0]["results"] == [["32", False]]  # without a cassette


def test_who_records_first_is_believed_by_all(tmp_path):
    """Two processes ask the same at the same time; here they are two readers of one file."""
    asked, number = threading.Barrier(8), itertools.count()

    def live():
        asked.wait(timeout=60)
        return next(number)

    with playing(tmp_path / "a.jsonl", "record"), ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda _: Exchange("http", "u", "same").answer(live), range(8)))
    assert len(set(answers)) == 1
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 1


def test_functions_of_an_agent_are_recorded_with_what_they_raise(tmp_path):
    numbers = itertools.count()

    @recorded
    def find(word, most=3):
        """Finds."""
        if word == "none":
            raise KeyError(word)
        return [word, most, next(numbers)]

    assert (find("a"), find("a"), find.__doc__) == (["a", 3, 0], ["a", 3, 1], "Finds.")
    with playing(tmp_path / "a.jsonl", "record"):
        assert (find("a"), find("a"), find("a", most=1)) == (["a", 3, 2], ["a", 3, 2], ["a", 1, 3])
        with pytest.raises(RuntimeError, match="KeyError: 'none'"):
            find("none")
    with playing(tmp_path / "a.jsonl"):
        assert (find("a", most=1), find("a")) == (["a", 1, 3], ["a", 3, 2])
        with pytest.raises(RuntimeError, match="KeyError: 'none'"):
            find("none")
        with pytest.raises(RewardError, match=r'no answer of function .*find: .*"b"'):
            find("b")
    with playing(tmp_path / "a.jsonl", faults={"late": 1.0}), pytest.raises(RuntimeError, match="put in by the"):
        find("a")
    with pytest.raises(TypeError, match="find is async"):

        @recorded
        async def find():
            pass


def test_what_a_server_refuses_is_replayed_with_its_status_and_waits(tmp_path):
    file, tries = tmp_path / "a.jsonl", Tries(5.0, retries=1, backoff_s=0.0, longest_wait_s=1.0)

    def read(body):
        raise Unusable("no number")

    def words(url):
        with pytest.raises(RuntimeError) as raised:
            post(url, b'{"messages": [{"content": "a"}]}', read, tries)
        return str(raised.value)

    script = {"a": [(429, {"Retry-After": "9"}, {})]}
    with judge_server(script=script) as server, playing(file, "record"):
        first = words(server.url)
    assert "HTTP 429 Too Many Requests: {} (it asks to wait for 9 s, more than 1 s)" in first
    with playing(file):
        assert words(server.url) == first
    file.unlink()
    with playing(file, "record"):
        assert "Connection refused" in words(server.url)
    with playing(file):
        assert "Connection refused" in words(server.url)

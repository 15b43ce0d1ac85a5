"""An episode as its requests meet it: which ids are kept, where a segment begins, what is refused."""

import json
import threading
import time
from dataclasses import replace

import pytest
import torch

from grpo.config.loss import LossOptions
from grpo.endpoint.api_error import ApiError
from grpo.endpoint.asked import ChatAsked, CompletionAsked
from grpo.endpoint.batcher import Batcher
from grpo.endpoint.body import read
from grpo.endpoint.episode import Episode
from grpo.learner.batch import collate
from grpo.learner.prepare import estimate, pack
from rewards.group_score import GroupScore
from rollout.decoding.engine import Engine
from rollout.group import Prompt, RolloutGroup
from rollout.relay import Relay
from rollout.request import Request
from rollout.sampling import SamplingParams

torch.set_num_threads(1)
CHAT = (
    "{% if tools %}tools: {{ tools | tojson }}{{ '\n' }}{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}{% if m.role == 'assistant' %}<eos>{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
TASK = "3 + 4 = ?\n"


@pytest.fixture(scope="module")
def engine(random_policy) -> Engine:
    policy = random_policy(3)
    policy.tokenizer.chat_template = CHAT.replace("<eos>", policy.tokenizer.decode([0]))
    return Engine(policy, max_rows=8)


@pytest.fixture(scope="module")
def params(engine) -> SamplingParams:
    stops = (0, *range(20, 256, 12))  # about one token in twenty
    return SamplingParams(1, 1.0, 12, stops, seed=5, draft_tokens=2, step=3)


@pytest.fixture(scope="module")
def batcher(engine, params):
    batcher = Batcher(engine, params, most_waiting=1000, wait_s=0.005)
    yield batcher
    batcher.close()


@pytest.fixture
def begin(engine, params, batcher):
    prompt = Prompt("task/1", TASK, engine.policy.tokenizer.encode(TASK))
    return lambda sample=0: Episode(prompt, sample, batcher, params, temperature=1.0)


def job_of(episode, **body):
    kind = ChatAsked if "messages" in body else CompletionAsked
    [job] = episode.jobs(read(kind, json.dumps({"model": "any"} | body).encode()))
    return job


def test_the_prompt_that_an_agent_was_given_has_its_own_tokens(engine, params, batcher):
    """Encoded as a text it might begin twice: what a chat template wrote has its first token already."""
    prompt = Prompt("task/1", TASK, [7, *engine.policy.tokenizer.encode(TASK)])
    episode = Episode(prompt, 0, batcher, params, temperature=1.0)
    assert job_of(episode, prompt=TASK).prompt.token_ids == prompt.token_ids


def answer(episode, job):
    there, found = threading.Event(), []
    episode.batcher.submit([job.request(lambda _, news: (found.append(news), news.completion and there.set()))])
    assert there.wait(30)
    return found[-1].completion


def ask(episode, **body):
    """The ids that the policy read, and its answer."""
    job = job_of(episode, **body)
    return job.prompt.token_ids, answer(episode, job)


def packed(group):
    """Its two completions as the learner reads them."""
    scores = [GroupScore([1.0, 0.0], {})]
    options = {"max_tokens": 999, "routing_replay": False, "mask_truncated": False}
    return pack([group], scores, *estimate(scores, LossOptions(), {}), **options)


def sent_back(completion):
    """An answer as OpenAI's client gives it."""
    return {"role": "assistant", "content": completion.text, "refusal": None, "tool_calls": None, "annotations": []}


def user(content):
    return {"role": "user", "content": content}


@pytest.mark.parametrize("kind", ["chat", "text", pytest.param("ids", marks=pytest.mark.slow)])
def test_contract_1_what_is_learned_from_are_the_ids_that_were_sampled(begin, engine, kind):
    """For each turn: the policy reads exactly what it has read and written before, and then what is new. The learner
    gets the same ids. To tokenise the text again would have given others."""
    tokenizer, differs, ends = engine.policy.tokenizer, 0, set()
    for sample in range(6):
        episode, messages, said, read_before = begin(sample), [user("3 + 4 = ?")], TASK, []
        said_ids, contexts, sampled = tokenizer.encode(TASK), [], []
        for turn in range(3):
            given = {"chat": {"messages": messages}, "text": {"prompt": said}, "ids": {"prompt": said_ids}}[kind]
            ids, completion = ask(episode, **given)
            assert ids[: len(read_before)] == read_before
            contexts.append(ids)
            sampled.append(completion.token_ids)
            ends.add(completion.finish_reason)
            read_before = ids + completion.token_ids
            messages = [*messages, sent_back(completion), user(f"and {turn}?")]
            said += completion.text + f" and {turn}? "
            said_ids = read_before + tokenizer.encode(f" and {turn}?")
            differs += (
                tokenizer.encode(completion.text) != completion.token_ids[: len(tokenizer.encode(completion.text))]
            )
        done = episode.finish({"reward": 1.0})
        whole = contexts[0] + done.token_ids
        for context, own in zip(contexts, sampled, strict=True):
            assert whole[: len(context) + len(own)] == context + own
        own = [token for token, mine in zip(done.token_ids, done.sampled, strict=True) if mine]
        assert own == [token for turn in sampled for token in turn]
        assert len(done.logprobs) == len(done.token_ids) == len(done.draft.depths)
        assert all((value < 0) == mine for value, mine in zip(done.logprobs, done.sampled, strict=True))
        batch = packed(RolloutGroup(episode.prompt, [done, done]))
        mini = collate(batch.rows, torch.device("cpu"))
        assert mini.token_ids[0, : len(whole)].tolist() == whole
        assert mini.token_ids[mini.scored].tolist() == own  # what was sampled twice is read once
        read = mini.by_completion(mini.of_scored(mini.token_ids.float()))
        assert read[mini.mask].tolist() == own * 2
        assert batch.num_completion_tokens == 2 * len(own)
    assert differs
    assert ends == {"stop", "length"}


def test_what_follows_an_answer_is_in_the_form_of_the_template(begin, engine):
    """A stop token that was sampled is not written twice; the end of an answer that was cut is read, not sampled."""
    tokenizer, seen = engine.policy.tokenizer, set()
    for sample in range(8):
        episode = begin(sample)
        first, completion = ask(episode, messages=[user("3")])
        second, _ = ask(episode, messages=[user("3"), sent_back(completion), user("4")])
        end = "" if completion.finish_reason == "stop" else tokenizer.decode([0])
        new = second[len(first) + len(completion.token_ids) :]
        assert tokenizer.decode(new) == f"{end}\nuser: 4\nassistant: "
        assert [turn["role"] for turn in episode.turns] == ["user", "assistant"] * 2
        assert (episode.turns[0], episode.turns[2]) == (user("3"), user("4"))
        seen.add(completion.finish_reason)
    assert seen == {"stop", "length"}


@pytest.mark.parametrize(
    "change",
    [
        lambda messages, answer: [user("other"), answer, user("b")],
        lambda messages, answer: [*messages, {**answer, "content": answer["content"] + "!"}, user("b")],
        lambda messages, answer: [{"role": "system", "content": "s"}, *messages, answer, user("b")],
        lambda messages, answer: messages,
        lambda messages, answer: [user("b")],
        lambda messages, answer: [*messages, user("b")],
    ],
)
def test_a_request_that_does_not_go_on_word_for_word_begins_a_segment(begin, engine, change):
    episode, messages = begin(), [user("a")]
    first, one = ask(episode, messages=messages)
    changed = change(messages, sent_back(one))
    second, two = ask(episode, messages=changed)
    asked = [{name: m[name] for name in ("role", "content")} for m in changed]
    rendered = engine.policy.tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    assert second == engine.policy.tokenizer.encode(rendered, add_special_tokens=False)
    done = episode.finish({})
    assert [(s.start, s.prompt_token_ids) for s in done.segments] == [(0, first), (len(one.token_ids), second)]
    assert done.token_ids == one.token_ids + two.token_ids
    assert [turn["content"] for turn in done.turns if turn["role"] == "assistant"] == [one.text, two.text]
    batch = packed(RolloutGroup(episode.prompt, [done, done]))
    learned = {(tuple(row.prompt_token_ids), tuple(s.token_ids)) for row in batch.rows for s in row.samples}
    assert learned == {(tuple(first), tuple(one.token_ids)), (tuple(second), tuple(two.token_ids))}
    assert batch.num_samples == 4


def test_other_tools_begin_a_segment_and_the_same_go_on(begin):
    episode, tools = begin(), [{"type": "function", "function": {"name": "f"}}]
    _, one = ask(episode, messages=[user("a")], tools=tools)
    _, completion = ask(episode, messages=[user("a"), sent_back(one), user("b")], tools=tools)
    assert len(episode.segments) == 1
    ask(episode, messages=[user("a"), sent_back(one), user("b"), sent_back(completion), user("c")])
    assert len(episode.segments) == 2


def test_segments_may_take_turns(begin):
    """As two agents do that have an episode together: each goes on with its own."""
    episode = begin()
    _, one = ask(episode, messages=[user("a")])
    _, two = ask(episode, messages=[user("b")])
    for content, completion in (("a", one), ("b", two)):
        ask(episode, messages=[user(content), sent_back(completion), user("more")])
    assert len(episode.segments) == 2
    assert [len(s.ids) > len(c.token_ids) for s, c in zip(episode.segments, (one, two), strict=True)] == [True, True]


def test_contract_4_tokens_follow_from_the_episode_and_what_was_asked(begin, engine, params):
    """The first request for the prompt of the data has the tokens of a rollout without an agent. Noise is never seen
    twice, and the order of requests does not matter."""
    episode = begin(4)
    ids, one = ask(episode, prompt=TASK)
    plain = engine.sample([Prompt("task/1", TASK, ids, first_sample=4)], params)[0].completions[0]
    assert (one.token_ids, one.text) == (plain.token_ids, plain.text)
    assert one.logprobs == pytest.approx(plain.logprobs, abs=1e-5)
    again = ask(episode, prompt=TASK)[1]
    other = ask(episode, prompt="7")[1]
    assert again.token_ids != one.token_ids
    turned = begin(4)
    assert ask(turned, prompt="7")[1].token_ids == other.token_ids
    assert [ask(turned, prompt=TASK)[1].token_ids for _ in range(2)] == [one.token_ids, again.token_ids]
    assert ask(begin(5), prompt=TASK)[1].token_ids != one.token_ids
    context, goes_on = ask(episode, prompt=TASK + one.text + "?")  # the noise goes on after what was said
    start = len(context) - len(ids)
    assert start == len(one.token_ids) + len(engine.policy.tokenizer.encode("?"))
    [plain] = engine.sample([Prompt("task/1", TASK, context, first_sample=4)], replace(params, start=start))
    assert goes_on.token_ids == plain.completions[0].token_ids


def test_a_greedy_evaluation_answers_greedily_what_asks_for_the_temperature_of_the_run(begin, params):
    episode = begin()
    episode.defaults = replace(params, temperature=0.0)
    assert job_of(episode, prompt=TASK, temperature=1.0).params.temperature == 0
    with pytest.raises(ApiError, match=r"temperature=0: the run learns at 1"):
        job_of(episode, prompt=TASK, temperature=0)


def test_what_could_not_be_learned_from_is_refused_and_leaves_no_trace(begin):
    episode = begin()
    for body, param, said in (
        ({"temperature": 0.7}, "temperature", "the run learns at 1 (rollout.temperature); leave it out"),
        ({"temperature": 0}, "temperature", "temperature=0: "),
        ({"top_p": 0.9}, "top_p", "whole distribution"),
        ({"top_k": 5}, "top_k", "whole distribution"),
        ({"logit_bias": {"5": 3}}, "logit_bias", "whole distribution"),
        ({"frequency_penalty": 1}, "frequency_penalty", "whole distribution"),
        ({"n": 2}, "n", "one line of answers"),
        ({"prompt": ["a", "b"]}, "prompt", "send them one by one"),
        ({"seed": 1}, "seed", "the noise is the run's"),
        ({"prompt_id": "x"}, "prompt_id", "the noise is the run's"),
        ({"stop": ["\n"]}, "stop", "would be learned from"),
        ({"prompt": [10**9]}, "prompt", "outside the vocabulary"),
        ({"prompt": "a b " * 200}, "prompt", "context is 256 tokens"),
    ):
        with pytest.raises(ApiError) as refused:
            job_of(episode, **{"prompt": "a"} | body)
        assert (refused.value.param, refused.value.status) == (param, 400)
        assert said in str(refused.value)
        assert episode.segments == []
    neutral = {"temperature": 1.0, "top_p": 1, "n": 1, "max_tokens": 999, "logprobs": 0}
    _, completion = ask(episode, prompt=TASK, **neutral)
    assert len(completion.token_ids) <= 12
    assert episode.finish({}).segments == []


def test_an_answer_that_nobody_waited_for_is_not_learned_from(begin):
    episode = begin()
    lost = job_of(episode, prompt=TASK)
    row = lost.request(lambda _, news: None)
    before = episode.batcher.counts.cancelled
    with episode.batcher._changed:  # no round in between
        episode.batcher.submit([row])
        episode.batcher.cancel([row])
    for _ in range(300):
        if episode.batcher.counts.cancelled > before:
            break
        time.sleep(0.1)
    assert episode.batcher.counts.cancelled == before + 1
    _, two = ask(episode, prompt=TASK)
    late = job_of(episode, prompt="late")
    done = episode.finish({})
    late.keep_completion(two)  # after the end
    assert len(done.turns) == 1
    assert done.token_ids == two.token_ids
    assert [segment.prompt_token_ids for segment in done.segments] == []
    with pytest.raises(ApiError, match="has ended"):
        job_of(episode, prompt="b")


def test_requests_at_the_same_time_are_segments_of_their_own(begin):
    """Both would go on with the same answer; the noise of one position is drawn from once."""
    episode = begin()
    _, one = ask(episode, prompt=TASK)
    jobs = [job_of(episode, prompt=TASK + one.text + tail) for tail in ("a", "b")]
    assert jobs[0].prompt.prompt_id != jobs[1].prompt.prompt_id
    completions = [answer(episode, job) for job in jobs]
    done = episode.finish({})
    assert len(done.segments) == 2
    assert sum(done.sampled) == len(one.token_ids) + sum(len(c.token_ids) for c in completions)


# ---- the batch -------------------------------------------------------------------------------------------------------


class Endless(Relay):
    """A batch whose completions never end, and which requests join when they are let."""

    def round(self, join=True):
        time.sleep(0.001)
        if join:
            super().round()

    def exchange(self):
        return {}


def wait_for(holds):
    end = time.monotonic() + 5
    while not holds() and time.monotonic() < end:
        time.sleep(0.002)
    assert holds()


@pytest.fixture
def endless(engine, params):
    """A batcher with such a batch, and a function that submits a request to it and returns it with the news it gets."""
    batcher = Batcher(Endless(engine.policy, 0, 8), params, most_waiting=8, wait_s=0.01)

    def submit():
        told = []
        request = Request(Prompt("", "", [5]), params, told.append)
        batcher.submit([request])
        return request, told

    yield batcher, submit
    batcher.close()


def test_a_request_joins_the_newer_policy_in_time_while_the_older_one_has_work(engine, endless):
    batcher, submit = endless
    older, newer = batcher.engine, Endless(engine.policy, 1, 8)
    submit()
    wait_for(lambda: older.requests)
    batcher.replace(newer)
    for count in (1, 2, 3):
        submit()
        wait_for(lambda count=count: len(newer.requests) == count)
    assert len(older.requests) == 1


@pytest.mark.parametrize("fault", ["drop", "replace"])
def test_when_the_thread_of_the_batch_ends_everybody_is_told(engine, endless, monkeypatch, fault):
    """What it decodes, what comes with the fault, and what comes later."""
    batcher, submit = endless

    def fails(*arguments):
        raise MemoryError("no memory")

    first, told = submit()
    wait_for(lambda: batcher.engine.requests)
    with batcher._changed:
        news = [told, submit()[1]]
        if fault == "drop":
            monkeypatch.setattr(batcher.engine, "drop", fails)
            batcher.cancel([first])
        else:
            monkeypatch.setattr(batcher, "_batch", fails)
            batcher.replace(Endless(engine.policy, 1, 8))
    wait_for(lambda: all(news))
    assert [[one.error for one in each] for each in news] == [["decoding has ended: MemoryError: no memory"]] * 2
    assert [one.error for one in submit()[1]] == ["the server has ended"]
    assert isinstance(batcher.error, MemoryError)
    assert not batcher.alive

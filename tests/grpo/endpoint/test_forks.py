"""Chats of agents in forks, with Qwen3's chat template and a small random Qwen3: each turn is sampled, and learned
from, after what a server would show. The template is the one that TRL ships of huggingface.co/Qwen/Qwen3-0.6B."""

import copy
import json
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import trl
from safetensors.torch import load_file

from grpo.cli.commands.check import examine_text
from grpo.cli.commands.summary import dry_run
from grpo.config.environment import AgentOptions
from grpo.endpoint.agent_sampler import AgentSampler
from grpo.endpoint.asked import ChatAsked, CompletionAsked
from grpo.endpoint.batcher import Batcher
from grpo.endpoint.body import read
from grpo.endpoint.episode import Episode
from grpo.endpoint.forks import ForkingEpisode
from grpo.learner.batch import collate
from grpo.learner.likelihood import Likelihood
from grpo.learner.prepare import pack
from grpo.train import train
from policies.policy import Policy
from policies.presets import small_tokenizer
from review.readers.run_folder import read_metrics
from rewards.group_score import GroupScore
from rewards.isolation.chat_template import render
from rewards.records import read_rollouts
from rollout.decoding.engine import Engine
from rollout.group import Prompt, RolloutGroup
from rollout.sampling import SamplingParams

torch.set_num_threads(1)
AGENTS = Path(__file__).parents[2] / "cases/agents.py"
TEMPLATE = Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"
MARKS = ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]


@pytest.fixture(scope="module")
def engine(hf_policy) -> Engine:
    """Thoughts end often in what it samples, and so do turns."""
    policy: Policy = hf_policy("qwen3", 3, max_position_embeddings=1024, vocab_size=300)
    tokenizer = copy.deepcopy(policy.tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS[:2]})
    tokenizer.add_tokens(MARKS[2:])
    tokenizer.chat_template = TEMPLATE.read_text()
    with torch.no_grad():
        ends = tokenizer.convert_tokens_to_ids(["</think>", "<|im_end|>"])
        policy.trunk.get_output_embeddings().weight[ends] *= 3
    return Engine(Policy(policy.trunk, None, tokenizer), max_rows=8)


@pytest.fixture(scope="module")
def batcher(engine):
    stop = engine.policy.tokenizer.convert_tokens_to_ids("<|im_end|>")
    params = SamplingParams(1, 1.0, 24, (stop,), seed=5, step=3)
    batcher = Batcher(engine, params, most_waiting=1000, wait_s=0.005, cache_tokens=4096)
    yield batcher
    batcher.close()


def user(content):
    return {"role": "user", "content": content}


def ask(episode, messages):
    """The ids that the policy read, and its answer."""
    [job] = episode.jobs(read(ChatAsked, json.dumps({"model": "any", "messages": messages}).encode()))
    there, found = threading.Event(), []
    episode.batcher.submit([job.request(lambda _, news: (found.append(news), news.completion and there.set()))])
    assert there.wait(60)
    return job.prompt.token_ids, found[-1].completion


def packed(groups):
    scores = [GroupScore([1.0], {}) for _ in groups]
    options = {"max_tokens": 999, "routing_replay": False, "mask_truncated": False}
    return pack(groups, scores, torch.ones(len(groups), 1), torch.zeros(len(groups)), **options)


def chat(kind, engine, batcher, sample, turns=3):
    """An episode of a client that sends back what it got, with the fields of an answer in the order of OpenAI's client:
    the ids that the policy read, its answers, and the texts."""
    tokenizer = engine.policy.tokenizer
    messages, contexts, answers, shown = [user("3 + 4 = ?")], [], [], []
    text = render(tokenizer, messages, add_generation_prompt=True)
    prompt = Prompt("task/1", text, tokenizer.encode(text))
    episode = kind(prompt, sample, batcher, batcher.params, 1.0)
    for turn in range(turns):
        shown.append(render(tokenizer, messages, add_generation_prompt=True))
        ids, completion = ask(episode, messages)
        contexts.append(ids)
        answers.append(completion)
        messages = [*messages, {"content": completion.text, "role": "assistant"}, user(f"and {turn}?")]
    return episode, contexts, answers, shown


@pytest.fixture(scope="module")
def chats(engine, batcher):
    return [chat(ForkingEpisode, engine, batcher, sample) for sample in range(8)]


def test_contract_14_the_context_of_each_turn_is_what_a_server_shows(engine, chats):
    """To the letter, with the ids of earlier answers as they were sampled from their thoughts on, and not as the text
    would be tokenised again."""
    tokenizer, differs, dropped = engine.policy.tokenizer, 0, 0
    mark = tokenizer.convert_tokens_to_ids("</think>")
    for _, contexts, answers, shown in chats:
        for turn, (context, text) in enumerate(zip(contexts, shown, strict=True)):
            assert tokenizer.decode(context) == text or "\ufffd" in text
            differs += context != tokenizer.encode(text, add_special_tokens=False)
            for answer in answers[:turn]:
                ids = answer.token_ids
                thought = max((place + 1 for place, token in enumerate(ids) if token == mark), default=0)
                dropped += thought > 0
                kept = ids[thought:]
                while kept and tokenizer.decode(kept[:1]).startswith("\n"):  # the template strips them
                    kept = kept[1:]
                assert any(context[place : place + len(kept)] == kept for place in range(len(context)))
    assert differs > 6
    assert dropped > 4


def test_contract_1_a_fork_is_learned_from_after_its_own_context(engine, chats):
    """Each answer is in the completion once, as it was sampled, after the ids that the policy read; the learner gives
    it the log-probabilities that it had in the served prompt."""
    forked = 0
    for episode, contexts, answers, _ in chats:
        done = episode.finish({"reward": 1.0})
        assert [turn["role"] for turn in done.turns] == ["assistant", *["user", "assistant"] * 2]
        texts = [[*prompt, *done.token_ids[at]] for prompt, at in done.parts(episode.prompt)]
        for context, answer in zip(contexts, answers, strict=True):
            known = [*context, *answer.token_ids]
            assert sum(text[: len(known)] == known for text in texts) >= 1
        own = [token for token, mine in zip(done.token_ids, done.sampled, strict=True) if mine]
        assert own == [token for answer in answers for token in answer.token_ids]
        forked += len(done.segments) > 1
        batch = packed([RolloutGroup(episode.prompt, [done])])
        mini = collate(batch.rows, torch.device("cpu"))
        with torch.no_grad():
            learner = Likelihood(engine.policy).forward(mini).logprobs
        served = []
        for context, answer in zip(contexts, answers, strict=True):
            logits = engine.policy.trunk(torch.tensor([[*context, *answer.token_ids]])).logits[0, len(context) - 1 : -1]
            served += logits.log_softmax(-1).gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0].tolist()
        assert learner[mini.mask].tolist() == pytest.approx(served, abs=1e-4)
        assert [value for value in done.logprobs if value] == pytest.approx(served, abs=1e-4)
    assert forked >= 3


def test_without_forks_thoughts_stay(engine, batcher, chats):
    """The first answer is the same; then the context is what was sampled, with its thought."""
    for sample, (_, contexts, answers, _) in enumerate(chats[:3]):
        episode, kept, same, _ = chat(Episode, engine, batcher, sample, turns=2)
        assert (kept[0], same[0].token_ids) == (contexts[0], answers[0].token_ids)
        assert kept[1][: len(kept[0]) + len(same[0].token_ids)] == [*kept[0], *same[0].token_ids]
        assert not episode.finish({}).segments


def test_a_request_of_its_own_begins_a_fork_and_texts_go_on(engine, batcher):
    """Messages that nobody was given have the ids of the tokenizer; /v1/completions is as without forks."""
    text = "3 + 4 = ?"
    prompt = Prompt("task/1", text, engine.policy.tokenizer.encode(text))
    episode = ForkingEpisode(prompt, 0, batcher, batcher.params, 1.0)
    edited = [user("3?"), {"role": "assistant", "content": "<think>\nx\n</think>\n\nNo."}, user("So?")]
    ids, _ = ask(episode, edited)
    shown = render(engine.policy.tokenizer, edited, add_generation_prompt=True)
    assert ids == engine.policy.tokenizer.encode(shown, add_special_tokens=False)
    assert [turn["content"] for turn in episode.turns[:2]] == ["3?", "So?"]
    [job] = episode.jobs(read(CompletionAsked, json.dumps({"model": "any", "prompt": text}).encode()))
    assert job.prompt.token_ids == engine.policy.tokenizer.encode(text)


# ---- runs ------------------------------------------------------------------------------------------------------------


def with_template(model, folder):
    """A copy of a small model with Qwen3's rule, and a blank as the end of a thought, which it writes."""
    shutil.copytree(model, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE.read_text().replace("'</think>'", "' '"))
    return folder


def tokenizer_with(template):
    tokenizer = small_tokenizer(["2 + 2 = 4\n"] * 20)
    tokenizer.chat_template = TEMPLATE.with_name(f"{template}.jinja").read_text()
    return tokenizer


def test_the_chat_template_decides_whether_an_agent_forks_and_a_check_says_so():
    for template, kind in {"qwen3": ForkingEpisode, "qwen2_5": Episode}.items():
        sampler = AgentSampler(SimpleNamespace(check_stop=None), AgentOptions(agent="agent.py:solve"), 1.0)
        tokenizer = tokenizer_with(template)
        assert sampler.kind(SimpleNamespace(policy=SimpleNamespace(tokenizer=tokenizer))) is kind
        note = examine_text(tokenizer, [0])[0].note
        assert ("without thoughts before a user's message" in note) == (kind is ForkingEpisode)
        sampler.close()


def test_the_plan_says_how_many_rows_forks_cost(micro_config, model, tmp_path):
    folder = with_template(model, tmp_path / "model")
    given = {"model": str(folder), "agent": f"{AGENTS}:chats"}
    report = dry_run(micro_config(tmp_path / "run", **given, **{"rollout.max_completion_tokens": 16}))
    printed = str(report.facts)
    assert "one more where a user's message" in printed
    assert "16 tokens of each earlier answer again" in printed


@pytest.mark.slow
def test_contracts_1_and_9_a_run_learns_what_was_sampled_and_goes_on_to_the_same_bits(micro_config, model, tmp_path):
    folder = with_template(model, tmp_path / "model")
    options = {"model": str(folder), "agent": f"{AGENTS}:chats", "steps": 2}
    options |= {"sft.steps": 0, "prompts_per_step": 2, "rollout.max_completion_tokens": 16}
    train(micro_config(tmp_path / "whole", **options))
    with pytest.raises(BaseException, match="stopped after step 1"):
        train(micro_config(tmp_path / "again", **options), stop_after=1)
    train(micro_config(tmp_path / "again", **options), resume="auto")
    forks = 0
    for step in (1, 2):
        lines, others = read_rollouts(tmp_path / "whole", step), read_rollouts(tmp_path / "again", step)
        for line, other in zip(lines, others, strict=True):
            assert line["policy_logprobs"] == pytest.approx(line["logprobs"], abs=1e-4)
            assert (line["token_ids"], line.get("segments")) == (other["token_ids"], other.get("segments"))
            forks += len(line.get("segments", [])) > 1
    assert forks > 2
    metrics = read_metrics(tmp_path / "whole")[-1]
    assert metrics["branches/rows"] > 0
    assert metrics["branches/tokens"] > metrics["branches/rows"]
    one, two = (load_file(next((tmp_path / run / "policy").glob("model*.safetensors"))) for run in ("whole", "again"))
    assert all(torch.equal(one[name], two[name]) for name in one)

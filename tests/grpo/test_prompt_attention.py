"""prompt_attention: bidirectional. A prompt that sees itself whole, in learner, engine, head and files alike."""

import json
from dataclasses import replace

import pytest
import torch
from engine_cases import (
    PARAMS,
    PROMPTS,
    assert_learner_agrees,
    assert_lossless,
    assert_packed_as_alone,
    assert_stock_is_refused,
    completions,
    drafts_in_training,
    spied_drafts,
    states,
    taught,
)
from resumed import whole_and_parts
from serving_cases import Running
from transformers import DeepseekV3ForCausalLM

from grpo.cli.commands.inspect import inspect
from grpo.cli.parse import main
from grpo.task.check import check_plan
from grpo.task.reward_models import check_teacher
from grpo.train import train
from grpo.trl_bridge import BridgeError, rollout_func
from policies.policy import Policy, PolicyError
from review.readers.run_folder import read_metrics
from rollout.decoding.engine import Engine
from rollout.faults import RolloutError
from rollout.pool import PoolOptions
from rollout.vllm.pool import VLLMPool
from rollout.vllm.settings import VLLMSettings

CPU = torch.device("cpu")
BOTH_WAYS = {"prompt_attention": "bidirectional"}


@pytest.fixture(scope="module")
def policy(random_policy) -> Policy:
    policy = random_policy(31)
    policy.attend_to_prompts("bidirectional")
    return taught(policy, 0.8, 20)


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()


def test_the_first_token_of_a_prompt_sees_its_last_one_and_nothing_of_a_completion(policy):
    prompt, first, second = [3, 4, 5, 6], [7, 8, 9], [10, 11]
    whole = states(policy, prompt, first, second)
    other_prompt = states(policy, [3, 4, 5, 60], first, second)
    assert apart(whole[0], other_prompt[0]) > 1e-2
    assert apart(whole[4], other_prompt[4]) > 1e-2
    other_end = states(policy, prompt, [7, 8, 90], [100, 11])
    assert apart(whole[:6], other_end[:6]) < 1e-5  # the prompt, and what comes before in its completion
    assert min(apart(whole[6], other_end[6]), apart(whole[7], other_end[7])) > 1e-2


@torch.no_grad()
def test_it_computes_what_the_stock_model_does_with_a_mask_that_shows_the_whole_prompt(policy):
    prompt, completion = [3, 4, 5, 6, 7], [8, 9, 10]
    stock = DeepseekV3ForCausalLM._from_config(policy.config, attn_implementation="eager").eval()
    stock.load_state_dict(policy.trunk.state_dict())
    mask = torch.full((8, 8), -torch.inf).triu(1)
    mask[:5, :5] = 0
    expected = stock(torch.tensor([prompt + completion]), attention_mask=mask[None, None]).logits[0]
    torch.testing.assert_close(states(policy, prompt, completion) @ policy.lm_head.T, expected, rtol=1e-4, atol=1e-4)


def test_packed_completions_are_those_of_rows_of_their_own(policy):
    assert_packed_as_alone(policy)


def test_contract_2_the_engine_says_what_the_learner_says(policy):
    for draft_tokens in (0, 3):
        groups = Engine(policy).sample(PROMPTS, replace(PARAMS, draft_tokens=draft_tokens))
        assert_learner_agrees(policy, groups, PARAMS.temperature)


def test_contract_3_drafts_change_no_token(policy):
    assert_lossless(Engine(policy), PROMPTS, PARAMS, depths=(1, 3))


@pytest.mark.slow
def test_drafts_are_what_the_head_says_as_training_sees_it(policy, monkeypatch):
    """Of a prompt it reads the trunk's states. Causal ones would cost acceptance and no token."""
    asked = spied_drafts(monkeypatch)
    rows = completions(Engine(policy).sample(PROMPTS[:4], replace(PARAMS, draft_tokens=2)))
    assert len(asked) > 50
    for row, count, drafts in asked:
        prompt, sample = PROMPTS[row // PARAMS.group_size], row % PARAMS.group_size
        assert drafts == drafts_in_training(policy, prompt, rows[row].token_ids[:count], drafts, PARAMS, sample)


def test_a_saved_policy_and_a_worker_see_the_same(policy, tmp_path):
    policy.save(tmp_path / "p")
    loaded, worker = Policy.load(tmp_path / "p"), Policy.from_skeleton(policy.skeleton())
    worker.load_weights(policy.weights())
    for other in (loaded, worker):
        assert torch.equal(other.lm_head, policy.lm_head)
        assert torch.equal(states(other, [3, 4, 5], [6]), states(policy, [3, 4, 5], [6]))
    loaded.attend_to_prompts("causal")
    assert not torch.equal(states(loaded, [3, 4, 5], [6]), states(policy, [3, 4, 5], [6]))


@pytest.mark.slow
def test_contract_9_a_run_trains_stops_goes_on_and_its_policy_remembers(micro_config, tmp_path):
    given = BOTH_WAYS | {"loss.beta": 0.1, "eval.limit": 4, "sft.steps": 1}
    _, run = whole_and_parts(lambda folder: micro_config(folder, **given), tmp_path, stop_after=2)
    far = [line["mismatch/logprob_abs_max"] for line in read_metrics(run) if "reward/mean" in line]
    assert len(far) == 3
    assert max(far) < 1e-4
    assert states(Policy.load(run / "policy"), [3, 4], [5]).isfinite().all()
    assert json.loads((run / "policy/config.json").read_text())["prompt_attention"] == "bidirectional"
    assert main(["eval", str(run), "--eval.limit", "2", "--threads", "1"]) == 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"rollout.backend": "vllm"}, "vLLM attends to prompts causally alone"),
        ({"prompt_attention": "both"}, "prompt_attention=both"),
    ],
)
def test_what_cannot_see_prompts_whole_is_refused_by_name(micro_config, tmp_path, given, said):
    with pytest.raises(ValueError, match=said):
        train(micro_config(tmp_path / "r", **BOTH_WAYS | given))
    assert not (tmp_path / "r").exists()


def test_a_checkpoint_is_what_its_run_asked_for(random_policy, micro_config, tmp_path, capsys):
    """Its run began with a policy that attends causally, by all of its heads."""
    random_policy(31, num_attention_heads=4, num_key_value_heads=4).save(tmp_path / "plain")
    given = BOTH_WAYS | {"active_heads": 0.75, "sft.steps": 0}
    train(micro_config(tmp_path / "run", model=str(tmp_path / "plain"), steps=1, **given))
    model = str(tmp_path / "run/checkpoints/step_000001")
    for folder in ("run", "run/policy", "run/checkpoints/step_000001"):
        assert_stock_is_refused(str(tmp_path / folder), tmp_path / "out", "prompt_attention=bidirectional", capsys)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 1
    assert "prompt_attention=bidirectional" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"prompt_attention=bidirectional \(so model says.*causally alone"):
        check_plan(micro_config(tmp_path / "next", model=model, **{"rollout.backend": "vllm", "sft.steps": 0}))
    counted = inspect(model)
    assert (counted.active_heads, counted.heads, counted.prompt_attention) == (3, 4, "bidirectional")
    assert counted == inspect(str(tmp_path / "run/policy"))
    given = {"distill.teacher": f"{model}@http://[::1]:9/v1", "loss.advantage": "distill"}
    with pytest.raises(ValueError, match=r"distill\.teacher=.* has prompt_attention=bidirectional"):
        check_teacher(micro_config(tmp_path / "r", model=str(tmp_path / "plain"), **given))


def test_a_chat_is_refused_once_the_policy_has_written_in_it(policy, tmp_path):
    """What it has written would be a part of the prompt, which it sees whole."""
    policy.save(tmp_path / "micro")
    (tmp_path / "micro/chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    server = Running(str(tmp_path / "micro"))
    try:
        asked = {"model": "micro", "messages": [{"role": "user", "content": "2 + 3"}], "max_tokens": 4}
        assert server.ask("/v1/chat/completions", asked)[0] == 200
        for written in ({"role": "assistant", "content": "5"}, {"role": "tool", "tool_call_id": "c", "content": "5"}):
            messages = [*asked["messages"], written, {"role": "user", "content": "4 + 4"}]
            status, answer, _ = server.ask("/v1/chat/completions", asked | {"messages": messages})
            assert (status, answer["error"]["code"]) == (400, "prompt_seen_whole")
            assert "to /v1/completions" in answer["error"]["message"]
    finally:
        server.end()


def test_a_pool_of_vllm_trl_and_a_damaged_field_are_refused_by_name(policy, tmp_path):
    with pytest.raises(RolloutError, match="vLLM reads prompts causally"):
        VLLMPool(policy, PoolOptions(vllm=VLLMSettings()))
    with pytest.raises(BridgeError, match="prompt_attention=bidirectional"):
        rollout_func(policy)
    policy.save(tmp_path / "p")
    config = json.loads((tmp_path / "p/config.json").read_text())
    (tmp_path / "p/config.json").write_text(json.dumps(config | {"prompt_attention": "sideways"}))
    with pytest.raises(PolicyError, match="prompt_attention='sideways': use causal or bidirectional"):
        Policy.load(tmp_path / "p")

"""TRL's real GRPOTrainer learns from what our pool sampled: the same ids, under the weights it has at that moment."""

import logging
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PrefixTuningConfig
from trl import GRPOConfig, GRPOTrainer

from grpo.trl_bridge import BridgeError, HeadAge, rollout_func
from policies.logprobs import shifted_logprobs
from policies.policy import Policy, checksum
from rewards import RewardSpec, Scorer, load_reward
from rewards.data.word_problems import word_problems
from rewards.protocol import bind
from rollout.group import Prompt
from rollout.sampling import SamplingParams
from rollout.workers.kinds import open_pool

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::RuntimeWarning")

G, LIMIT = 4, 10
ADAPTERS = {
    "full": None,
    "llama": None,  # no MLA, no head: decoded by the model's own forward
    "lora": LoraConfig(r=4, target_modules=["q_proj", "o_proj", "kv_b_proj"]),
    "lora_experts": LoraConfig(
        r=4, target_modules="all-linear", target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    ),
}


def letters(completions, **_):
    """Random text earns it in parts, so that no group is tied."""
    return [sum(c.isalpha() for c in completion) / 20 for completion in completions]


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    rows = word_problems("train", [1], count=16)
    return Dataset.from_list([{"prompt": f"{row['question']}\n", "answer": row["answer"]} for row in rows])


def make_trainer(policy, rollout, dataset, folder, *, model=None, peft_config=None, rewards=(letters,), **options):
    options = {
        "bf16": False,
        "use_cpu": True,
        "per_device_train_batch_size": 2 * G,
        "per_device_eval_batch_size": 2 * G,
        "num_generations": G,
        "max_completion_length": LIMIT,
        "learning_rate": 1e-2,
        "max_steps": 2,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
    } | options
    return GRPOTrainer(
        model=model or policy.trunk,
        processing_class=policy.tokenizer,
        reward_funcs=list(rewards),
        args=GRPOConfig(str(folder), **options),
        train_dataset=dataset,
        rollout_func=rollout,
        peft_config=peft_config,
    )


class Recorder:
    """Two steps of a trainer, and what went where: publications, returned rollouts, what TRL scored and trained on."""

    def __init__(self, policy, dataset, folder, *, draft_tokens=2, **options):
        self.rollout = rollout_func(policy, draft_tokens=draft_tokens, warn_every=1)
        self.returned, self.synced, self.scored, self.prompts, self.warnings = [], [], [], [], []

        def call(prompts, trainer):
            self.prompts.append(prompts)
            self.returned.append(self.rollout(prompts, trainer))
            self.synced.append({name: t.clone() for name, t in self.rollout.pool.engine.policy.state_dict().items()})
            return self.returned[-1]

        self.trainer = make_trainer(policy, call, dataset, folder, **options)
        score = self.trainer._get_per_token_logps_and_entropies

        def spy(model, input_ids, attention_mask, logits_to_keep, **keywords):
            out = score(model, input_ids, attention_mask, logits_to_keep, **keywords)
            for ids, seen, logprobs in zip(input_ids, attention_mask.bool(), out[0].detach(), strict=True):
                completion = seen[-logits_to_keep:]
                self.scored.append((ids[seen].tolist(), logprobs[completion].tolist()))
            return out

        self.trainer._get_per_token_logps_and_entropies = spy
        with pytest.MonkeyPatch.context() as patch:
            logger = logging.getLogger("grpo.trl_bridge")
            patch.setattr(logger, "warning", lambda said, *given: self.warnings.append(said % given if given else said))
            self.trainer.train()

    def rows(self, call):
        out = self.returned[call]
        return sorted(
            (prompt + completion, logprobs)
            for prompt, completion, logprobs in zip(
                out["prompt_ids"], out["completion_ids"], out["logprobs"], strict=True
            )
        )


@pytest.fixture(scope="module", params=ADAPTERS)
def record(request, micro_policy, hf_policy, dataset, tmp_path_factory) -> Recorder:
    policy, drafts = micro_policy(0), 2
    if request.param == "llama":
        policy, drafts = hf_policy("llama", 0, num_hidden_layers=1), 0
    policy.trunk.generation_config.eos_token_id = list(range(90))  # so many stop tokens that some completions stop
    folder = tmp_path_factory.mktemp("trl")
    return Recorder(policy, dataset, folder, draft_tokens=drafts, peft_config=ADAPTERS[request.param])


def test_contract_1_trl_trains_on_the_ids_that_were_sampled(record):
    assert len(record.returned) == 2
    assert len(record.scored) == 4 * G
    lengths = set()
    for call in range(2):
        trained = sorted(record.scored[call * 2 * G : (call + 1) * 2 * G])
        assert [ids for ids, _ in trained] == [ids for ids, _ in record.rows(call)]
        for prompt, ids in zip(record.prompts[call], record.returned[call]["prompt_ids"], strict=True):
            assert ids == record.trainer.processing_class(prompt)["input_ids"]
        reasons = record.returned[call]["finish_reason"]
        for ids, reason in zip(record.returned[call]["completion_ids"], reasons, strict=True):
            lengths.add(len(ids))
            assert (ids[-1] < 90) == (reason == "stop")  # the stop token is in, and trained on
            assert not any(token < 90 for token in ids[:-1])
    assert len(lengths) > 1


def test_contract_2_log_probabilities_agree_with_trls(record):
    for call in range(2):
        trained = sorted(record.scored[call * 2 * G : (call + 1) * 2 * G])
        for (_, theirs), (_, ours) in zip(trained, record.rows(call), strict=True):
            assert theirs == pytest.approx(ours, abs=1e-4)


def test_contract_5_every_call_samples_with_the_weights_of_that_moment(record, micro_policy):
    first, second = (checksum(weights) for weights in record.synced)
    assert first != second
    out = record.returned[1]
    plain = Policy.from_skeleton(record.rollout.policy.skeleton())
    differences = []
    for weights in record.synced:
        plain.load_weights(weights)
        worst = 0.0
        for prompt, completion, logprobs in zip(out["prompt_ids"], out["completion_ids"], out["logprobs"], strict=True):
            ids = torch.tensor([prompt + completion])
            with torch.no_grad():
                own = shifted_logprobs(plain.trunk(ids).logits, ids)[0, -len(completion) :]
            worst = max(worst, (own - torch.tensor(logprobs)).abs().max().item())
        differences.append(worst)
    assert differences[1] < 1e-4  # under the second publication
    assert differences[0] > 1e-2  # and not under the first


def test_contract_4_the_key_is_step_and_call_and_drafts_change_no_token(record):
    """Another engine with the recorded weights, without drafts, finds the tokens of both calls."""
    pool = open_pool(record.rollout.policy)
    for call, weights in enumerate(record.synced):
        pool.sync_weights(weights, call)
        out = record.returned[call]
        prompts = [Prompt(f"trl/train/{i}", "", out["prompt_ids"][i * G]) for i in range(2)]
        stops = tuple(record.trainer.eos_token_ids)
        params = SamplingParams(G, 1.0, LIMIT, stops, seed=record.trainer.args.seed).at(call)
        tokens = [c.token_ids for group in pool.sample(prompts, params) for c in group.completions]
        assert tokens == out["completion_ids"]


def test_the_trained_policy_is_saved_with_its_head(record, tmp_path):
    policy = record.rollout.policy
    policy.save(tmp_path / "policy")
    loaded = Policy.load(tmp_path / "policy")
    now = policy.weights()
    assert checksum(loaded.weights()) == checksum(now)
    assert any(name.startswith("mtp.") for name in now) == (policy.mtp is not None)


def test_acceptance_and_age_of_the_head_are_logged(record):
    first, second = (line for line in record.trainer.state.log_history if "loss" in line)
    if record.rollout.policy.mtp is None:
        assert "draft/mtp_head_age" not in first
        return
    assert (first["draft/mtp_head_age"], second["draft/mtp_head_age"]) == (0, 1)
    for line in (first, second):
        assert 0 <= line["draft/acceptance_depth_2"] <= 1
        assert line["draft/tokens_per_forward"] >= 1


def test_an_ageing_head_is_warned_of(record):
    if record.rollout.policy.mtp is None:
        assert record.warnings == []
        return
    [warning] = record.warnings
    assert "the MTP head is 1 steps older than the policy" in warning
    assert "at step 0" in warning
    assert "at step 1" in warning


def test_a_head_ages_until_it_is_trained_and_warns_every_so_often():
    head, trained = {"w": torch.zeros(2)}, {"w": torch.ones(2)}
    age = HeadAge(warn_every=3)
    notes = [age.note(step, head, [0.9 - step / 10, 0.5]) for step in range(7)]
    assert [bool(note) for note in notes] == [False, False, False, True, False, False, True]
    assert "6 steps older" in notes[6]
    assert "0.90 0.50 at step 0, 0.30 0.50 at step 6" in notes[6]
    assert age.note(9, trained, [0.8]) is None
    assert (age.steps(9), age.steps(11)) == (0, 2)
    assert "0.80 at step 9, 0.70 at step 12" in age.note(12, trained, [0.7])


def test_our_rewards_run_in_trl_unchanged(micro_policy, dataset, tmp_path):
    file = tmp_path / "own.py"
    file.write_text(
        "from rewards import per_completion\n"
        "@per_completion\n"
        "async def vowels(completion, answer, finish_reason, log_metric):\n"
        "    assert '####' in answer and finish_reason in ('stop', 'length')\n"
        "    log_metric('own/length', len(completion))\n"
        "    return sum(c in 'aeiou' for c in completion) / 10\n"
    )
    penalty = {"target": 2, "per_token": 0.25}
    rewards = [
        load_reward("gsm8k"),
        load_reward(f"{file}:vowels"),
        bind(load_reward("length_penalty"), penalty),
        bind(load_reward("regex_format"), {"pattern": "[a-m]"}),
    ]
    record = Recorder(micro_policy(0), dataset, tmp_path, rewards=rewards, max_steps=1)
    out, tokenizer = record.returned[0], record.trainer.processing_class
    texts = tokenizer.batch_decode(out["completion_ids"], skip_special_tokens=True)
    answers = {row["prompt"]: row["answer"] for row in dataset}
    specs = [
        RewardSpec("gsm8k"),
        RewardSpec(f"{file}:vowels"),
        RewardSpec("length_penalty", arguments=penalty),
        RewardSpec("regex_format", arguments={"pattern": "[a-m]"}),
    ]
    with Scorer(specs) as scorer:
        scores = scorer.score(
            prompts := record.prompts[0][::G],
            [texts[:G], texts[G:]],
            [{"answer": answers[prompt], "finish_reason": "length"} for prompt in prompts],
            prompt_ids=["0", "1"],
            completion_ids=[out["completion_ids"][:G], out["completion_ids"][G:]],
        )
    line = record.trainer.state.log_history[0]
    for name in ("gsm8k", "vowels", "length_penalty", "regex_format"):
        ours = fmean(value for score in scores for value in score.parts[name])
        assert line[f"rewards/{name}/mean"] == pytest.approx(ours, abs=1e-6)
    assert line["rewards/length_penalty/mean"] == pytest.approx(
        -0.25 * fmean(max(len(ids) - 2, 0) for ids in out["completion_ids"])
    )
    assert line["rewards/vowels/mean"] > 0
    assert line["own/length"] == pytest.approx(fmean(len(text) for text in texts))


@pytest.fixture
def idle(micro_policy, dataset, tmp_path):
    """A rollout_func and a trainer that has not trained yet."""
    policy = micro_policy(0)
    rollout = rollout_func(policy)
    return rollout, make_trainer(policy, rollout, dataset, tmp_path, num_generations_eval=2)


@pytest.mark.slow
def test_noise_is_new_at_every_call_and_the_same_for_a_resumed_trainer(idle, micro_policy):
    rollout, trainer = idle
    trainer.model.train()
    prompts = ["2 + 3 = ?"] * (2 * G)
    calls = [rollout(prompts, trainer)["completion_ids"] for _ in range(2)]
    trainer.state.global_step = 1
    trainer.model.eval()
    calls.append(rollout(["2 + 3 = ?"] * 4, trainer)["completion_ids"])
    trainer.model.train()
    calls.append(rollout(prompts, trainer)["completion_ids"])
    assert [len(call) for call in calls] == [2 * G, 2 * G, 4, 2 * G]
    completions = [tuple(ids) for call in calls for ids in call]
    assert len(set(completions)) == len(completions)  # a prompt that stands twice is sampled twice
    resumed = rollout_func(rollout.policy)
    assert resumed(prompts, trainer)["completion_ids"] == calls[3]  # evaluation in between shifts nothing


@pytest.mark.slow
def test_chat_prompts_get_the_chat_template_of_the_tokenizer(idle):
    rollout, trainer = idle
    trainer.processing_class.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}bot:{% endif %}"
    )
    out = rollout([[{"role": "user", "content": "2 + 3"}]] * G, trainer)
    assert out["prompt_ids"] == [trainer.processing_class("user: 2 + 3\nbot:")["input_ids"]] * G


def test_sharded_weights_and_prompts_that_are_no_whole_groups_are_refused(idle, monkeypatch):
    rollout, trainer = idle
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "accelerator", SimpleNamespace(distributed_type="FSDP"))
        with pytest.raises(BridgeError, match=r"shards its weights \(FSDP\)"):
            rollout(["a"] * G, trainer)
    trainer.model.train()
    for prompts in (["a"] * (G + 1), ["a"] * (G - 1) + ["b"]):
        with pytest.raises(BridgeError, match=r"no whole groups of num_generations=4; make per_device_train_batch"):
            rollout(prompts, trainer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_p": 0.9}, r"top_p=0.9: our pool samples from the whole"),
        ({"top_k": 50}, "top_k=50"),
        ({"repetition_penalty": 1.2, "min_p": 0.1}, "drop min_p, repetition_penalty from GRPOConfig"),
        ({"generation_kwargs": {"typical_p": 0.5}}, "generation_kwargs"),
        ({"peft_config": LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)}, "use_dora=True"),
        ({"peft_config": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])}, "modules_to_save"),
        ({"peft_config": PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")}, "PrefixTuningConfig"),
        ({"model": "another"}, r"use GRPOTrainer\(model=policy.trunk\)"),
    ],
)
def test_a_trainer_that_cannot_be_sampled_for_is_refused(micro_policy, dataset, tmp_path, options, message):
    policy = micro_policy(0)
    if options.get("model"):
        options = {"model": micro_policy(1).trunk}
    rollout = rollout_func(policy)
    trainer = make_trainer(policy, rollout, dataset, tmp_path, **options)
    with pytest.raises(BridgeError, match=message):
        trainer.train()
    assert rollout.pool is None


def test_drafts_without_a_head_are_refused(micro_policy):
    policy = micro_policy(0)
    with pytest.raises(BridgeError, match="warn_every=0"):
        rollout_func(policy, warn_every=0)
    policy.mtp = None
    with pytest.raises(BridgeError, match="draft_tokens=2, but the policy has no MTP head"):
        rollout_func(policy, draft_tokens=2)

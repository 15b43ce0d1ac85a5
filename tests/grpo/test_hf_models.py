"""Any causal LM of transformers trains unconverted: the same learner, the same run, the same commands."""

import json
from pathlib import Path

import pytest
import torch
from resumed import whole_and_parts
from small_learner import small_learner
from transformers import AutoModelForCausalLM

from grpo.cli.config.inference import EvalConfig
from grpo.cli.parse import main
from grpo.config.learner import LearnerOptions, MTPOptions
from grpo.config.run import TrainConfig
from grpo.learner.batch import collate
from grpo.learner.row import PackedRow, Sample
from grpo.run import checkpoint
from grpo.source.agreement import check_agreement
from grpo.source.policy_source import load_policy
from grpo.task.check import check_plan
from grpo.train import train
from policies.paths import Paths
from policies.policy import Policy, PolicyError
from review.readers.run_folder import read_metrics
from rewards.records import read_rollouts

CPU = torch.device("cpu")
PROMPT = [5, 9, 2, 7, 7, 30]
COMPLETIONS = [[3, 4, 5, 0], [8], [40, 41, 42, 43, 44, 0], [9, 9]]
KINDS: dict[str, dict] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16, "num_key_value_heads": 1},
    "gemma3_text": {"head_dim": 8, "sliding_window": 32},
    "gpt2": {"n_positions": 256},
}
LINEAR = {f"linear_{name}": 2 for name in ("num_key_heads", "num_value_heads")}
LINEAR |= {"head_dim": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
LINEAR |= {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
INKLING = {"head_dim": 8, "swa_head_dim": 8, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "d_rel": 4}
INKLING |= {"rel_extent": 32, "sliding_window_size": 16, "moe_intermediate_size": 16, "n_routed_experts": 4}
INKLING |= {"num_experts_per_tok": 2, "n_shared_experts": 1}
INDEXER = {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "v_head_dim": 6}
INDEXER |= {"qk_rope_head_dim": 8, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 64, "n_routed_experts": 4}
INDEXER |= {"moe_intermediate_size": 16, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}


def _row() -> PackedRow:
    return PackedRow(PROMPT, [Sample(i, ids, [-1.0] * len(ids), 1.0) for i, ids in enumerate(COMPLETIONS)])


def _padded_logprobs(policy) -> torch.Tensor:
    """[G, L] by the model's own forward on right-padded rows, zeros behind each completion."""
    longest = max(map(len, COMPLETIONS))
    rows = torch.tensor([PROMPT + ids + [1] * (longest - len(ids)) for ids in COMPLETIONS])
    mask = torch.tensor([[1] * (len(PROMPT) + len(ids)) + [0] * (longest - len(ids)) for ids in COMPLETIONS])
    logits = policy.trunk(input_ids=rows, attention_mask=mask, use_cache=False).logits[:, len(PROMPT) - 1 : -1]
    logprobs = logits.log_softmax(-1).gather(2, rows[:, len(PROMPT) :, None])[..., 0]
    return logprobs * mask[:, len(PROMPT) :]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_contract_10_packed_is_padded(hf_policy, kind, attention):
    policy = hf_policy(kind, 1, **KINDS[kind])
    policy.trunk.set_attn_implementation(attention)
    learner = small_learner(policy, LearnerOptions(), MTPOptions())
    packed = learner.likelihood.forward(collate([_row()], CPU)).logprobs
    padded = _padded_logprobs(policy)
    assert (packed - padded).abs().max() < 1e-4
    assert padded.abs().max() > 1
    weights = torch.linspace(-1, 1, padded.numel()).view_as(padded)
    both = []
    for logprobs in (packed, padded):
        policy.zero_grad()
        (weights * logprobs).sum().backward()
        both.append({name: p.grad.clone() for name, p in policy.trunk.named_parameters()})
    for name, gradient in both[1].items():
        assert (both[0][name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name


@pytest.fixture(scope="module")
def saved(hf_policy, tmp_path_factory):
    """`saved("qwen2")`: the folder of such a model, as its makers would publish it."""
    root = tmp_path_factory.mktemp("models")

    def folder_of(kind: str) -> str:
        folder = root / kind
        if not folder.exists():
            policy = hf_policy(kind, 2, **(KINDS | {"qwen3_5_text": LINEAR})[kind])
            policy.trunk.save_pretrained(folder)
            policy.tokenizer.save_pretrained(folder)
        return str(folder)

    return folder_of


@pytest.fixture(scope="module")
def config_of(micro_config, saved):
    """`config_of(output_dir, "qwen2", **options)`: three steps of four prompts."""
    plain = {"rollout.draft_tokens": None, "mtp.depth": 4, "sft.steps": 0}
    return lambda folder, kind, **given: micro_config(folder, **plain | {"model": saved(kind)} | given)


def _tensors(folder: Path, step: int) -> dict[str, torch.Tensor]:
    loaded = checkpoint.load(folder / f"checkpoints/step_{step:06d}")
    return {f"{file}/{name}": t for file, mapping in loaded.tensors.items() for name, t in mapping.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "lora"),
    [
        ("llama", True),
        ("qwen3", False),
        ("qwen3_5_text", False),
        *(pytest.param(*case, marks=pytest.mark.long) for case in (("llama", False), ("qwen2", False))),
        *(pytest.param(*case, marks=pytest.mark.long) for case in (("qwen2", True), ("qwen3", True))),
    ],
)
def test_grpo_trains_it_and_contract_9_a_stopped_run_resumes_to_the_same_bits(config_of, tmp_path, kind, lora):
    given = {"lora.rank": 4, "loss.beta": 0.05} if lora else {}
    whole, _ = whole_and_parts(lambda folder: config_of(folder, kind, **given), tmp_path)
    first, last = _tensors(whole, 1), _tensors(whole, 3)
    moved = [name for name in last if name.startswith("policy/") and not torch.equal(first[name], last[name])]
    assert len(moved) > len([name for name in last if name.startswith("policy/")]) / 2
    assert all(".lora_" in name for name in moved) == lora
    for line in read_metrics(whole):
        assert line["mismatch/logprob_abs_mean"] < 1e-5  # the sampler's against the learner's own
    assert (read_metrics(whole)[0].get("loss/kl") == pytest.approx(0.0, abs=1e-6)) == lora


@pytest.mark.long
def test_adapters_with_two_workers_train_to_the_same_bits(config_of, tmp_path):
    alone, two = tmp_path / "alone", tmp_path / "two"
    given = {"lora.rank": 2, "steps": 2}
    train(config_of(alone, "qwen2", **given))
    train(config_of(two, "qwen2", **given, **{"rollout.workers": 2}))
    assert read_rollouts(alone, 2) == read_rollouts(two, 2)
    first, second = _tensors(alone, 2), _tensors(two, 2)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", ["llama", pytest.param("qwen2", marks=pytest.mark.slow)])
def test_what_is_saved_is_what_transformers_loads(config_of, saved, tmp_path, kind):
    train(config_of(tmp_path / "run", kind, **{"lora.rank": 4, "steps": 2}))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "run/policy", dtype=torch.float32)
    policy = load_policy(TrainConfig(model=str(tmp_path / "run"), output_dir=tmp_path / "next"))
    before = AutoModelForCausalLM.from_pretrained(saved(kind), dtype=torch.float32)
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        assert torch.equal(stock(ids).logits, policy.trunk(ids).logits)
        assert not torch.allclose(stock(ids).logits, before(ids).logits, atol=1e-4)
    written = json.loads((tmp_path / "run/policy/config.json").read_text())
    assert written["model_type"] == kind
    assert "num_nextn_predict_layers" not in written
    assert stock.generation_config.eos_token_id == 0
    assert (stock.lm_head.weight is stock.model.embed_tokens.weight) == (kind == "qwen2")


@pytest.mark.slow
def test_the_commands_take_it(saved, tmp_path, capsys, letters):
    """sft, train with an SFT stage, eval and sample, as a user types them."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "3 + 4 ="}\n')
    common = ["--threads=1", "--data.task_options.levels=[1]", "--data.limit=12", "--eval.limit=4", "--log.trackers=[]"]
    common += ["--rollout.max_completion_tokens", "8"]
    model = ["--model", saved("qwen2")]
    sft = ["--steps", "2", "--prompts_per_step", "2"]
    assert main(["sft", *model, *common, *sft, "--output_dir", str(tmp_path / "sft")]) == 0
    grpo = ["--steps", "2", "--prompts_per_step", "2", "--rollout.group_size", "2"]
    grpo += ["--sft.steps", "2", "--sft.batch_size", "2"]
    grpo += ["--rewards", f"[{{function: {letters}}}]"]
    assert main(["train", *model, *common, *grpo, "--output_dir", str(tmp_path / "train")]) == 0
    assert main(["train", *model, *common, *grpo, "--output_dir", str(tmp_path / "dry"), "--dry_run"]) == 0
    for run in ("sft", "train"):
        assert main(["eval", str(tmp_path / run), "--eval.limit", "4", "--rollout.max_completion_tokens", "8"]) == 0
    out = tmp_path / "groups.json"
    arguments = [
        "--prompts",
        str(tmp_path / "prompts.jsonl"),
        "--rollout.max_completion_tokens",
        "8",
        "--json",
        str(out),
    ]
    assert main(["sample", str(tmp_path / "train"), *arguments]) == 0
    assert len(json.loads(out.read_text())["groups"][0]["completions"]) == 4
    assert "held-out problems" in capsys.readouterr().out


def test_an_mtp_head_asked_of_it_is_refused_and_one_that_is_not_trained_asks_for_nothing(
    config_of, saved, tmp_path, monkeypatch
):
    """So that a config with `mtp: {loss_weight: 0}` serves a converted model and its dense original alike."""
    monkeypatch.setattr("grpo.source.policy_source.Policy.load", None)
    for given, named in (({"rollout.draft_tokens": 2}, "rollout.draft_tokens=2"), ({"mtp.depth": 2}, "mtp.depth=2")):
        config = config_of(tmp_path / "run", "qwen2", **given)
        for refuse in (check_plan, train):
            with pytest.raises(ValueError, match=f"^{named} with .*of type 'qwen2' .*: it has no MTP head and can be"):
                refuse(config)
        assert not (tmp_path / "run").exists()
    config = config_of(tmp_path / "run", "qwen2", **{"mtp.loss_weight": 0, "mtp.depth": 2})
    assert check_plan(config).source.base == config.model
    with pytest.raises(ValueError, match=r"^rollout.draft_tokens=3 with .*quartet convert"):
        check_plan(EvalConfig(model=saved("llama"), rollout={"draft_tokens": 3}))
    assert check_plan(EvalConfig(model=saved("llama"), rollout={"draft_tokens": 0})).source.base == saved("llama")


@pytest.mark.parametrize(
    ("kind", "config", "paths"),
    [
        ("granite", {"logits_scaling": 4.0}, Paths()),
        ("cohere", {}, Paths()),
        ("phi", {}, Paths()),  # its LM head has a bias
        ("gpt2", {"n_positions": 256}, Paths("own", "alone")),
        ("gemma2", {"head_dim": 8}, Paths()),  # its scores are capped
        ("gpt_oss", {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}, Paths()),  # sinks
        ("glm_moe_dsa", INDEXER, Paths()),
        ("bloom", {"max_position_embeddings": None}, Paths("joined", "alone")),
        ("falcon", {}, Paths("joined", "alone")),  # it asks for torch's attention by its name
        ("inkling_text", INKLING, Paths("joined", "alone")),
        ("mamba", {}, Paths("own", "alone")),  # states alone, from which it reads one token at a time
        ("rwkv", {"attention_hidden_size": 32, "context_length": 256}, Paths("whole", "alone")),
        ("bert", {"is_decoder": True}, Paths("joined", "alone", "head")),
    ],
)
def test_the_fastest_path_that_agrees_is_taken(hf_policy, kind, config, paths):
    policy = hf_policy(kind, 3, **config)
    check_agreement(policy)
    assert policy.paths == paths
    assert Policy.from_skeleton(policy.skeleton()).paths == paths  # a worker's


def test_what_the_load_check_found_comes_with_the_policy_of_a_folder(hf_policy, tmp_path):
    hf_policy("inkling_text", **INKLING).save(tmp_path)
    assert load_policy(EvalConfig(model=str(tmp_path))).paths == Paths("joined", "alone")


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt_oss"])
def test_contract_10_rows_alone_are_packed_rows(hf_policy, kind):
    sizes = KINDS.get(kind, {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}) | {"sliding_window": 8}
    policy, mini = hf_policy(kind, 1, **sizes), collate([_row(), _row()], CPU)
    both = []
    for rows in ("packed", "alone"):
        policy.paths = Paths(rows=rows)
        policy.zero_grad()
        logprobs = small_learner(policy, LearnerOptions(), MTPOptions()).likelihood.forward(mini).logprobs
        logprobs.square().sum().backward()
        both.append((logprobs.detach(), policy.trunk.get_input_embeddings().weight.grad.clone()))
    for packed, alone in zip(*both, strict=True):
        assert (packed - alone).abs().max() <= 2e-5 * packed.abs().max()


def test_a_model_whose_forward_is_not_causal_is_refused_by_name(hf_policy):
    """BERT as it is made to fill gaps."""
    with pytest.raises(PolicyError, match="a model of type 'bert' cannot be trained here: the sampler fails in every"):
        check_agreement(hf_policy("bert", 3, is_decoder=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [*KINDS, "gpt_neox", "phi3", "olmo2"])
def test_models_that_agree_are_taken(hf_policy, kind, dtype):
    policy = hf_policy(kind, **KINDS.get(kind, {}))
    for parameter in policy.parameters():
        parameter.data = parameter.data.to(dtype)
    check_agreement(policy)


def test_positions_that_nobody_can_restart_are_noticed(hf_policy, monkeypatch):
    """A trunk that ignores `position_ids`: the sampler places tokens right by chance, the packed row does not."""
    policy = hf_policy("llama")
    decoder, forward = policy.trunk.model, policy.trunk.model.forward

    def counting(input_ids=None, position_ids=None, attention_mask=None, **rest):
        if attention_mask is not None:
            position_ids = torch.arange(input_ids.shape[1])[None].expand_as(input_ids)
        return forward(input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask, **rest)

    monkeypatch.setattr(decoder, "forward", counting)
    check_agreement(policy)
    assert policy.paths == Paths("own", "alone")


def test_every_linear_layer_takes_adapters_whatever_its_name(hf_policy):
    policy = hf_policy("gpt_neox")
    policy.add_lora(rank=2, alpha=4.0)
    adapted = {
        name.split(".lora_A")[0].rsplit(".", 1)[-1] for name, _ in policy.trunk.named_parameters() if "lora_A" in name
    }
    assert adapted == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}

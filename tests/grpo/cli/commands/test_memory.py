"""Memory from a configuration alone, against what real policies, learners and engines hold; who shares a GPU, and what
is recommended where they do not fit."""

from __future__ import annotations

import base64
import doctest
import json
import re
import runpy
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_learner import small_learner, term_of

from grpo.cli.commands import machine, memory, memory_table, shares
from grpo.cli.commands.machine import LessMemory
from grpo.cli.commands.memory import MemoryOfRun, activation_bytes, derived_bytes, storage_bytes, tensors_of
from grpo.cli.commands.memory_table import DeviceMemory, on_devices
from grpo.cli.commands.shares import Shares
from grpo.cli.parse import main
from grpo.config.learner import LearnerOptions, MTPOptions, ParallelOptions
from grpo.config.loss import LossOptions
from grpo.config.mtp import MtpConfig
from grpo.config.run import SftConfig, TrainConfig
from grpo.config.sampling import RolloutOptions
from grpo.learner.learner import Learner
from grpo.task import table
from policies.anatomy import anatomy
from policies.logprobs import CHUNK_ELEMENTS
from policies.policy import Policy, PolicyError, read_config, read_tokenizer
from rewards.config.options import load
from rollout.pool import PoolOptions
from rollout.vllm.settings import KV_CACHE_BYTES
from rollout.workers.local_pool import LocalPool
from rollout.workers.worker import Worker

ROOT = Path(__file__).parents[4]
DTYPES = [torch.float32, torch.bfloat16]
TARGETS = {"all": None, "attention": ["q_proj", "o_proj"], "head too": ["q_proj", "experts", "router", "mtp"]}


def options(kind: type, dtype: torch.dtype = torch.float32, **given):
    return load(kind, None, {"output_dir": "x", "dtype": str(dtype).removeprefix("torch."), **given})


def in_dtype(policy: Policy, dtype: torch.dtype, folder) -> Policy:
    """As a run loads it: routers stay in fp32."""
    policy.save(folder / "policy")
    return Policy.load(folder / "policy", dtype)


def step(learner: Learner) -> None:
    """A gradient for everything, and a step of the optimizer."""
    policy = learner.policy
    ids = torch.arange(6)[None] % policy.config.vocab_size
    causal = torch.zeros_like(ids)
    hidden = policy.hidden(ids, ids, causal)
    loss = (hidden @ policy.lm_head.T).float().square().mean()
    if policy.mtp is not None and term_of(learner, "draft_head").options.loss_weight:
        loss = loss + sum(out.float().square().mean() for out in policy.unroll(hidden, ids, ids, causal, 1))
    learner.masters.backward(loss)
    learner.optimizer.step()


def moved(learner: Learner) -> list[torch.Tensor]:
    return [p for group in learner.optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("targets", [False, *TARGETS])
def test_a_learner_holds_what_was_foretold(random_policy, tmp_path, dtype, targets):
    policy = in_dtype(random_policy(), dtype, tmp_path)
    shape = policy.config
    given = {} if targets is False else {"lora.rank": 3, "lora.targets": TARGETS[targets]}
    config = options(TrainConfig, dtype, **given)
    if config.lora:
        policy.add_lora(config.lora.rank, config.lora.alpha, config.lora.targets)
    learner = small_learner(policy, config.learner, config.mtp)
    foretold = MemoryOfRun(shape, True, config).learner()
    assert foretold.weights == storage_bytes(tensors_of(policy))
    assert foretold.weights == sum(t.nbytes for t in (*policy.parameters(), *policy.buffers()))
    assert foretold.masters == sum(master.nbytes for _, master in learner.masters.pairs)
    step(learner)
    assert foretold.gradients == sum(p.grad.nbytes for p in moved(learner))
    state = learner.optimizer.state
    assert foretold.moments == sum(state[p][key].nbytes for p in moved(learner) for key in ("exp_avg", "exp_avg_sq"))
    own = {t.untyped_storage()._cdata for t in tensors_of(policy)}
    fresh = [t for t in learner.weights().values() if t.untyped_storage()._cdata not in own]
    assert foretold.publication == storage_bytes(fresh)


@pytest.mark.parametrize(
    ("layout", "cut"),
    [
        ({"fsdp": 2}, {"experts": 2, "q_proj": 2, "router": 2}),
        ({"tensor": 2}, {"experts": 2, "q_proj": 1, "router": 1, "lm_head": 2, "shared": 2}),
        ({"fsdp": 2, "tensor": 2}, {"experts": 4, "q_proj": 2, "router": 2, "lm_head": 4}),
        ({"fsdp": 4, "expert": 2}, {"experts": 4, "q_proj": 4, "shared": 4}),
        ({"fsdp": 2, "tensor": 2, "expert": 4}, {"experts": 4, "q_proj": 2, "shared": 4, "head": 2}),
    ],
)
def test_a_rank_holds_its_share(layout, cut):
    names = {
        "experts": "trunk.model.layers.1.mlp.experts.down_proj",
        "q_proj": "trunk.model.layers.1.self_attn.q_proj.weight",
        "router": "trunk.model.layers.1.mlp.gate.weight",
        "shared": "trunk.model.layers.1.mlp.shared_experts.gate_proj.weight",
        "lm_head": "trunk.lm_head.weight",
        "head": "mtp.block.mlp.experts.down_proj",
    }
    weight = torch.empty(8, 16, 16, device="meta")
    given = Shares.of(ParallelOptions(**layout))
    assert {part: weight.numel() / given.held(names[part], weight) for part in cut} == cut
    assert given.held("trunk.a.lora_A.default.weight", weight) == weight.numel()
    assert Shares(fsdp=2).held("trunk.model.norm.weight", torch.empty(33)) == 17  # rounded up
    assert Shares.of(ParallelOptions(fsdp=1), 3) == Shares(replicate=3)  # whole copies
    ranks = given.ranks
    with pytest.raises(ValueError, match=f"and there are {ranks + 1}"):
        Shares.of(ParallelOptions(**{"fsdp": given.fsdp} | layout), ranks + 1)


def test_what_is_shared_shrinks_and_what_is_gathered_stays(random_policy):
    shape, found = random_policy().config, {}
    for ranks in (1, 2, 4):
        found[ranks] = MemoryOfRun(shape, True, options(TrainConfig, **{"learner.parallel.fsdp": ranks})).learner()
    for name in ("weights", "gradients", "moments"):
        one, two, four = (getattr(found[ranks], name) for ranks in (1, 2, 4))
        assert two == pytest.approx(one / 2, rel=0.02)
        assert four == pytest.approx(one / 4, rel=0.05)
    assert found[1].gathered == found[1].buffers == found[1].saving == 0
    assert found[2].gathered == found[4].gathered > 0
    assert found[2].count == 2
    config = options(TrainConfig, **{"learner.parallel.fsdp": 2, "mtp.loss_weight": 0})
    assert MemoryOfRun(shape, True, config).learner().gathered < found[2].gathered  # a head at rest is not gathered
    first, others = MemoryOfRun(shape, True, options(TrainConfig, **{"learner.parallel.fsdp": 4})).devices()
    assert (first.name, others.name, others.count) == ("rank 0, which samples", "each of 3 other ranks", 3)
    assert first.peak > others.peak


def test_moments_of_8_bits_are_what_was_foretold(random_policy):
    pytest.importorskip("torchao")
    policy = random_policy(hidden_size=128, intermediate_size=192, moe_intermediate_size=64)
    config = options(TrainConfig, **{"learner.optimizer": "adamw_8bit"})
    learner = small_learner(policy, config.learner, config.mtp)
    step(learner)
    tensors, _ = learner.state()
    kept = sum(t.nbytes for name, t in tensors["optimizer"].items() if not name.endswith("/step"))
    assert MemoryOfRun(policy.config, True, config).learner().moments == kept


def test_what_is_not_trained_costs_nothing(random_policy):
    """An exact form keeps its latent norms, a head with loss_weight 0 gets no gradient, and AdamW skips both."""
    policy = random_policy(quartet_exact_mla=True, attention_bias=True)
    config = options(TrainConfig, **{"mtp.loss_weight": 0})
    foretold = MemoryOfRun(policy.config, True, config).learner()
    learner = small_learner(policy, LearnerOptions(), MTPOptions(loss_weight=0))
    step(learner)
    with_gradient = [p for p in moved(learner) if p.grad is not None]
    assert foretold.gradients == sum(p.grad.nbytes for p in with_gradient)
    assert foretold.moments == 2 * foretold.gradients
    frozen = policy.config.num_hidden_layers * (12 + 12 + 8)  # a norm of 12 latents; a bias of those and 8 rotated keys
    assert foretold.gradients == 4 * (sum(p.numel() for p in policy.trunk.parameters()) - frozen)


def test_a_reference_is_a_second_policy_unless_adapters_can_be_switched_off(random_policy):
    policy = random_policy()
    learner = small_learner(policy, LearnerOptions(), MTPOptions(), LossOptions(beta=0.1))
    config = options(TrainConfig, **{"loss.beta": 0.1})
    foretold = MemoryOfRun(policy.config, True, config).learner()
    assert foretold.reference == storage_bytes(tensors_of(learner.likelihood.reference))
    assert MemoryOfRun(policy.config, True, config).learner(sft_stage=True).reference == 0
    adapted = options(TrainConfig, **{"loss.beta": 0.1, "lora.rank": 2})
    assert MemoryOfRun(policy.config, True, adapted).learner().reference == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["llama", "deepseek"])
def test_a_teacher_is_held_whole_on_every_rank(hf_policy, random_policy, tmp_path, dtype, kind):
    teacher = in_dtype(hf_policy("llama", 2) if kind == "llama" else random_policy(2), dtype, tmp_path)
    shape, folder = random_policy().config, str(tmp_path / "policy")
    given = {"loss.advantage": "distill", "distill.teacher": folder}
    for more in ({}, {"learner.parallel.fsdp": 2}, {"rollout.workers": 2}):
        found = MemoryOfRun(shape, True, options(TrainConfig, dtype, **given | more)).devices()
        assert len(found) == (2 if more else 1)
        samples = [device.name.endswith("workers") for device in found]
        held = storage_bytes(tensors_of(teacher))
        assert [device.teacher for device in found] == [0 if alone else held for alone in samples]
    [with_it] = MemoryOfRun(shape, True, options(TrainConfig, dtype, **given)).devices()
    [without] = MemoryOfRun(shape, True, options(TrainConfig, dtype)).devices()
    assert with_it.peak - without.peak == with_it.teacher > 0
    assert [row for row in memory_table.rows([replace(with_it, teacher=2**30)]) if "teacher" in row["part"]]
    warm = MemoryOfRun(shape, True, options(TrainConfig, dtype, **given | {"sft.steps": 1})).devices()[0]
    assert (warm.name, warm.teacher) == ("SFT stage", 0)
    elsewhere = options(TrainConfig, dtype, **given | {"distill.teacher": f"{folder}@http://127.0.0.1:9/v1"})
    assert MemoryOfRun(shape, True, elsewhere).devices() == [without]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [{}, {"q_lora_rank": 6, "kv_lora_rank": 40}])
def test_samplers_hold_what_was_foretold(random_policy, tmp_path, dtype, shape):
    """In process nothing of its own, it reads the learner's weights; in a Ray worker a copy in their precision."""
    policy = in_dtype(random_policy(**shape), dtype, tmp_path)
    here, elsewhere = (
        MemoryOfRun(policy.config, True, options(TrainConfig, dtype, **{"rollout.workers": workers})).devices()[-1]
        for workers in (0, 1)
    )
    local = LocalPool(policy, PoolOptions(dtype=dtype, prompts_per_shard=2)).engine
    assert local.policy is policy
    name = str(dtype).removeprefix("torch.")
    worker = Worker(policy.skeleton(), name, name, "cpu", 1).engine
    for engine, foretold in ((local, here), (worker, elsewhere)):
        assert foretold.sampler == (0 if engine.policy is policy else storage_bytes(tensors_of(engine.policy)))
        own = {t.untyped_storage()._cdata for t in tensors_of(engine.policy)}
        derived = tensors_of([engine.trunk, engine.head])
        held = [t for t in derived if t.is_mkldnn or t.untyped_storage()._cdata not in own]
        assert foretold.derived == storage_bytes(held) == foretold.publication > 0


def test_biases_cost_what_is_left_out_of_the_derived(random_policy):
    policy = random_policy(attention_bias=True)
    (foretold,) = MemoryOfRun(policy.config, True, options(TrainConfig)).devices()
    assert 0 < derived_bytes(policy, torch.float32, policy.device) - foretold.derived < 0.02 * foretold.derived


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_causal_lm_decodes_with_its_own_forward(hf_policy, tmp_path, dtype):
    policy = in_dtype(hf_policy("llama"), dtype, tmp_path)
    for workers in (0, 2):
        config = options(TrainConfig, dtype, **{"rollout.workers": workers, "rollout.max_completion_tokens": 10})
        found = MemoryOfRun(policy.config, False, config).devices()[-1]
        assert (found.sampler, found.derived) == (storage_bytes(tensors_of(policy)) if workers else 0, 0)
        cache = 64 * 10 * 3 * 2 * 2 * 8  # rows · tokens · layers · (K and V) · KV heads · width of a head
        logits = 64 * policy.config.vocab_size
        assert found.rollout == cache * dtype.itemsize + logits * (dtype.itemsize + 4)


def test_layers_with_a_window_keep_as_many_entries(hf_policy):
    """In our cache, and those of a recurrent layer none."""
    config = options(TrainConfig, torch.float32, **{"rollout.max_completion_tokens": 10})
    shape = hf_policy("llama").config
    plain = MemoryOfRun(shape, False, config).sampler().rollout
    for kinds, share in ((["sliding_attention", "full_attention"], 1), (["linear_attention", "full_attention"], 0.5)):
        mixed = deepcopy(shape)
        mixed.num_hidden_layers, mixed.layer_types = 2, kinds
        two = deepcopy(shape)
        two.num_hidden_layers = 2
        whole, logits = (MemoryOfRun(two, False, config).sampler().rollout, 64 * shape.vocab_size * 8)
        assert MemoryOfRun(mixed, False, config).sampler().rollout - logits == share * (whole - logits)
        assert whole < plain


def test_a_micro_batch_has_one_completion_at_least(random_policy):
    found = []
    for size in (512, 4096):
        given = {"rollout.max_completion_tokens": 4096, "learner.tokens_per_micro_batch": size}
        found.append(MemoryOfRun(random_policy().config, True, options(TrainConfig, **given)).learner().activations)
    assert found[0] == found[1]


def saved_for_backward(policy: Policy, tokens: int) -> int:
    """Bytes that autograd keeps between a forward and its backward pass, without parameters."""
    own = {t.untyped_storage()._cdata for t in tensors_of(policy)}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in own:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    ids = torch.zeros(1, tokens, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = policy.hidden(ids, torch.arange(tokens)[None], torch.zeros_like(ids))
        size = storage_bytes(kept.values())
    assert hidden.requires_grad
    return size


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["llama", "deepseek"])
def test_activations_are_roughly_what_autograd_keeps(hf_policy, random_policy, dtype, kind):
    policy = hf_policy("llama") if kind == "llama" else random_policy(mtp=False, q_lora_rank=16)
    policy = policy.to(dtype)
    rough = activation_bytes(policy, 64, 64, dtype, 0, checkpointing=False) - CHUNK_ELEMENTS * (2 * dtype.itemsize + 12)
    assert 0.6 < rough / saved_for_backward(policy, 64) < 1.6


def test_checkpointing_keeps_one_layer(random_policy):
    policy = random_policy(mtp=False, num_hidden_layers=8)
    whole, spared = (activation_bytes(policy, 1000, 100, torch.float32, 0, checkpointing=c) for c in (False, True))
    fixed = CHUNK_ELEMENTS * 20 + 1000 * 100 * 5
    assert 4 * (spared - fixed) < whole - fixed


def test_what_samples_ahead_is_a_worker_with_a_copy_of_its_own(random_policy):
    shape = random_policy().config
    learner, worker = MemoryOfRun(shape, True, options(TrainConfig, **{"rollout.staleness": 1})).devices()
    assert (learner.name, learner.sampler, worker.name) == ("learner", 0, "the worker")
    assert worker.sampler > 0
    assert learner.older == 0
    older, _ = MemoryOfRun(shape, True, options(TrainConfig, **{"rollout.staleness": 2})).devices()
    trained = sum(p.numel() for p in random_policy().parameters())
    assert 4 * trained == older.older == older.peak - learner.peak
    for given, samplers in (
        ({}, 0),
        ({"staleness": 1}, 1),
        ({"staleness": 2}, 1),
        ({"staleness": 1, "workers": 3}, 3),
        ({"staleness": 1, "backend": "vllm"}, 0),
    ):
        assert RolloutOptions(**given).samplers == samplers


def test_each_kind_of_device_has_a_column(random_policy):
    shape = random_policy().config
    both = {"sft.steps": 3, "rollout.workers": 4, "lora.rank": 2}
    warm, learner, worker = MemoryOfRun(shape, True, options(TrainConfig, **both)).devices()
    assert [device.name for device in (warm, learner, worker)] == ["SFT stage", "learner", "each of 4 workers"]
    assert warm.gradients > learner.gradients  # the SFT stage trains every weight, adapters or not
    assert learner.sampler == learner.rollout == worker.weights == worker.moments == 0
    (alone,) = MemoryOfRun(shape, True, options(SftConfig)).devices()
    assert (alone.sampler, alone.publication) == (0, 0)
    (taught,) = MemoryOfRun(shape, True, options(MtpConfig)).devices()
    head = sum(p.numel() for p in random_policy().mtp.parameters())
    assert (taught.gradients, taught.moments, taught.masters) == (4 * head, 8 * head, 0)
    rows = memory_table.rows([warm, learner, worker])
    assert "each of 4 workers" in rows[0]
    assert not any("reference" in row["part"] for row in rows)


def test_docstring_examples():
    assert sum(doctest.testmod(module).failed for module in (memory, memory_table, shares)) == 0


GPUS = ROOT / "docs/gpus"
MOONLIGHT = GPUS / "architecture/moonlight_16b"


def test_moonlights_architecture_has_the_published_sizes():
    """15.29 B and 2.24 B active without embeddings are the figures of its model card."""
    shape = read_config(MOONLIGHT)
    attention = 2048 * 16 * 192 + 2048 * 576 + 512 + 512 * 16 * 256 + 16 * 128 * 2048 + 2 * 2048
    expert, shared, router = 3 * 2048 * 1408, 3 * 2048 * 2816, 64 * 2048
    dense = 3 * 2048 * 11264
    inside = 27 * attention + dense + 26 * (64 * expert + shared + router) + 2048
    active = 27 * attention + dense + 26 * (6 * expert + shared + router) + 2048
    embeddings = 2 * 163840 * 2048
    assert (round(inside / 1e9, 2), round(active / 1e9, 2)) == (15.29, 2.24)
    counted = anatomy(shape, 0, context=1, lora_rank=1, lora_alpha=1.0)
    assert (counted.parameters, counted.active_parameters) == (inside + embeddings, active + embeddings)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mtp", ["45"]),
        pytest.param("lora", ["48", "17"], marks=pytest.mark.long),
        ("lora_workers", ["17", "32"]),
        ("full", ["58", "27"]),
    ],
)
def test_moonlights_configurations_pass_the_dry_run(name, expected, monkeypatch, capsys, tmp_path):
    """On the data that is always there; the file's own is GSM8K. Expected are the peaks in GiB, by kind of process."""
    monkeypatch.setattr(table, "find_spec", lambda name: True)  # the optimizer is an extra
    monkeypatch.setattr(memory, "will_block", lambda dtype, device: False)  # as on a GPU
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**40))
    monkeypatch.chdir(tmp_path)
    command = "mtp" if name == "mtp" else "train"
    file = GPUS / f"moonlight_{name.removesuffix('_workers')}.yaml"
    words = [command, str(file), "--model", str(MOONLIGHT), "--data.name", "word_problems"]
    if name == "lora_workers":
        words += ["--rollout.workers", "4", "--rollout.prompts_per_shard", "8"]
    gib = "141" if name == "lora" else "80"
    assert main([*words, "--dry_run", "--device_gib", gib]) == 0
    shown = capsys.readouterr().out
    weights = {"mtp": "30.8", "full": "3.72"}.get(name, "29.73")  # GiB of bfloat16; only quartet mtp adds a head
    assert weights in shown, shown
    assert ("each of 4 workers" in shown) == (name == "lora_workers")
    [peaks] = [re.findall(r"\d+\.\d\d", line) for line in shown.splitlines() if "at most, about" in line]
    assert [f"{float(peak):.0f}" for peak in peaks] == expected
    assert not list(tmp_path.iterdir())


def test_moonlights_tokenizer_is_converted_without_running_its_code(tmp_path, monkeypatch):
    """A made-up vocabulary in the format of the checkpoint: bytes, four merges, special tokens up to the last row."""
    pytest.importorskip("tiktoken")
    ranks = [bytes([byte]) for byte in range(256)] + [b"ll", b"ell", b" 1", b"12"]
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(ranks)]
    (tmp_path / "tiktoken.model").write_text("\n".join(lines) + "\n")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deepseek_v3", "vocab_size": 266}))
    added = {number: {"content": name} for number, name in ((260, "[BOS]"), (263, "<|im_end|>"))}
    own = {"auto_map": {"AutoTokenizer": ["tokenization_moonshot.Its", None]}, "eos_token": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added, **own}))
    module = (
        'raise SystemExit\nclass Its:\n    pat_str = "|".join([r"[A-Z]", r"[a-z]+", r" ?\\d{1,3}", r"[^a-zA-Z0-9]"])\n'
    )
    (tmp_path / "tokenization_moonshot.py").write_text(module)
    with pytest.raises(PolicyError, match="custom code"):
        read_tokenizer(tmp_path)
    monkeypatch.setattr("sys.argv", ["moonlight_tokenizer.py", str(tmp_path)])
    runpy.run_path(str(GPUS / "moonlight_tokenizer.py"), run_name="__main__")
    tokenizer = read_tokenizer(tmp_path)
    ids = [72, 257, 111, 258, 50, 51, 263]  # H|ello| 123: " 1" merges before "12"
    assert tokenizer.encode("Hello 123<|im_end|>") == ids
    assert (len(tokenizer), tokenizer.eos_token_id) == (266, 263)
    assert tokenizer.decode([265]) == "<|reserved_token_265|>"


ANY = float("inf")


def planned(kind: type = TrainConfig, **given):
    return load(kind, None, {"output_dir": "x", **given})


def placed(ranks: int, workers: int, gpus: float = ANY, **given) -> list[tuple[str, int, int]]:
    """(name, how many, GiB while sampling) of devices, where a learner holds 10 and a worker 3."""
    learner = DeviceMemory(f"each of {ranks} ranks", ranks, weights=10)
    worker = DeviceMemory("a worker", workers, sampler=2, rollout=1)
    config = planned(**{"rollout.workers": workers} | given)
    return [(it.name, it.count, it.phases["sampling"]) for it in on_devices(learner, worker, config, gpus)]


@pytest.mark.parametrize(
    ("ranks", "workers", "gpus", "given", "expected"),
    [  # GPUs of their own as Ray packs them
        (2, 4, ANY, {}, [("each of 2 ranks", 2, 10), ("each of 4 workers", 4, 3)]),
        (1, 1, ANY, {}, [("each of 1 ranks", 1, 10), ("the worker", 1, 3)]),
        (2, 4, 0, {}, [("each of 2 ranks", 2, 10), ("a worker", 4, 3)]),  # on CPUs
        # beside a learner, where there are no others
        (16, 16, 16, {}, [("each of 16 ranks and worker, in turn", 16, 13)]),
        (2, 1, 2, {}, [("one rank and worker, in turn", 1, 13), ("the other rank", 1, 10)]),
        (1, 1, 1, {}, [("learner and worker, in turn", 1, 13)]),
        (1, 1, 2, {}, [("each of 1 ranks", 1, 10), ("the worker", 1, 3)]),
        # by Ray each rank has a whole GPU, and the workers others
        (2, 5, 2, {"learner.workers": 2}, [("each of 2 ranks", 2, 10), ("each of 5 workers", 5, 3)]),
        (1, 1, 1, {"rollout.staleness": 1}, [("each of 1 ranks", 1, 10), ("a worker, on CPUs", 1, 3)]),
    ],
)
def test_where_workers_are(ranks, workers, gpus, given, expected):
    assert placed(ranks, workers, gpus, **given) == expected


def test_who_is_away_holds_nothing_while_the_learner_works():
    learner = DeviceMemory("a", weights=10, activations=7)
    worker = DeviceMemory("b", sampler=4, derived=2, rollout=3)
    both = learner.beside(worker, "both", in_turn=True)
    assert (both.phases["sampling"], both.phases["learning"], both.phases["saving"]) == (19, 17, 16)
    assert learner.beside(worker, "both", in_turn=False).phases["learning"] == 23


def test_a_plan_of_workers_beside_a_learner_is_the_sum_of_both(random_policy):
    shape, given = random_policy().config, {"rollout.workers": 1}
    [both] = MemoryOfRun(shape, True, planned(**given)).devices(1)
    learner, worker = MemoryOfRun(shape, True, planned(**given)).devices(2)
    assert both.phases["sampling"] == learner.phases["sampling"] + worker.phases["sampling"]
    assert both.phases["learning"] == learner.phases["learning"]
    assert both.host == learner.host + worker.host
    assert worker.host == learner.host > 0


def test_what_else_was_in_no_plan(random_policy):
    """vLLM, whose copy is its own."""
    shape = random_policy().config
    [own], [vllm] = (MemoryOfRun(shape, True, planned(**more)).devices() for more in ({}, {"rollout.backend": "vllm"}))
    assert own.sampler == 0 < vllm.sampler
    assert vllm.rollout == KV_CACHE_BYTES
    [elsewhere] = MemoryOfRun(
        shape, True, planned(**{"rollout.backend": "vllm", "rollout.vllm.url": "http://a:1"})
    ).devices()
    assert elsewhere.sampler == elsewhere.rollout == 0


def test_vllm_has_a_gpu_of_its_own_where_there_is_one_and_sleeps_elsewhere(random_policy):
    memory = MemoryOfRun(random_policy().config, True, planned(**{"rollout.backend": "vllm"}))
    assert [device.name for device in memory.devices(2)] == ["learner", "vLLM"]
    [both] = memory.devices(1)
    assert both.in_turn
    ahead = {"rollout.backend": "vllm", "rollout.staleness": 1}
    [both] = MemoryOfRun(random_policy().config, True, planned(**ahead)).devices(1)
    assert not both.in_turn


def advice(shape, config, gib: float, gpus: float = ANY) -> str:
    there = machine.Memory("memory", gib * machine.GIB, gib * machine.GIB, gpus)
    search = LessMemory(config, lambda other: there.used(MemoryOfRun(shape, True, other).devices(gpus)), gpus)
    return search.words()


def recommended(said: str) -> dict[str, str]:
    return dict(re.findall(r"([a-z_.]+): ([\w.]+)", said))


def test_what_is_recommended_makes_it_fit_and_is_not_set_yet(random_policy):
    shape = random_policy(hidden_size=128).config
    set_already = {"learner.gradient_checkpointing": True, "dtype": "bfloat16", "rollout.workers": 1}
    config = planned(**set_already, **{"learner.tokens_per_micro_batch": 8192})
    there = machine.Memory("", machine.GIB, 0, ANY)
    full = there.used(MemoryOfRun(shape, True, config).devices(ANY)) * (1 - machine.SPARE)  # GiB
    said = advice(shape, config, full)  # a fifth too little
    assert said.startswith("it fits with ")
    assert not recommended(said).keys() & set_already.keys()
    for key, value in recommended(said).items():
        changed = load(TrainConfig, None, {"output_dir": "x", **set_already, key: value})
        size = there.used(MemoryOfRun(shape, True, changed).devices(ANY)) * (1 - machine.SPARE)
        assert size <= full * (1 - machine.SPARE), key


@pytest.mark.slow
def test_what_fits_only_together_is_named_together_and_what_cannot_fit_is_said(random_policy):
    shape = random_policy(hidden_size=128).config
    config = planned(**{"rollout.workers": 1, "rollout.max_completion_tokens": 64})
    several = advice(shape, config, 0.18)
    assert several.endswith(" together")
    assert len(recommended(several)) > 1
    least = advice(shape, config, 1e-6)
    assert least.startswith("no option makes it fit, even with ")
    assert least.endswith("use larger devices or a smaller model")
    on_cpus = advice(shape, config, 0.9, gpus=0)  # two processes
    assert "learner.workers" not in on_cpus


def test_a_supervised_run_has_no_samplers_and_nothing_in_main_memory_besides_its_learner(random_policy):
    shape, config = random_policy().config, planned(SftConfig)
    assert MemoryOfRun(shape, True, config).devices()[0].host == 0
    assert "rollout.workers" not in advice(shape, config, 1e-6)


@pytest.mark.parametrize(("gib", "code"), [pytest.param(16, 0, marks=pytest.mark.slow), (0.01, 1)])
def test_a_run_that_does_not_fit_has_an_exit_code(micro_config, tmp_path, capsys, gib, code):
    config = micro_config(tmp_path / "r")
    words = ["train", "--model", config.model, "--output_dir", str(tmp_path / "r"), "--data.task_options.levels", "[1]"]
    words += ["--rollout.max_completion_tokens", "16"]
    assert main([*words, "--dry_run", "--device_gib", str(gib)]) == code
    shown = capsys.readouterr().out
    assert ("DOES NOT FIT" in shown) == bool(code)
    assert "main memory: about" in shown

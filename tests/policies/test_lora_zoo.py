"""Adapters of every type of the zoo: on which matrices they are, that they begin as nothing, and that they merge."""

import copy
import inspect

import pytest
import torch
import zoo
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from grpo.cli.commands.export import ExportError, _refuse_lost_adapters, peft_config
from policies import lora
from policies.policy import Policy, checksum
from rollout.workers.kinds import open_pool

FEW = ("gpt2", "phi3", "granitemoe", "glm4", "qwen3_5_moe", "mamba2")  # of different structures
BELOW = {  # 95 %, with the reason that weighs most; for others that is an indexer
    "dbrx": lora.OTHER,  # its experts lie in one matrix, which the module around reads
    "falcon_mamba": lora.READ,
    "hy_v4": lora.OTHER,  # hyper-connections
    "mamba": lora.READ,
    "recurrent_gemma": lora.OTHER,
    "reformer": lora.READ,
    "xlnet": lora.OTHER,
    "zamba": lora.SHARED,
    "zamba2": lora.SHARED,
    "zaya": lora.BY_NAME.format("router"),
}
UNBUILT = ("minimax_m3_vl_text", "minimax_m3_vl_text/below")  # the forward fails with which the zoo scales logits
SINGLE = ("inkling2_loop_text", "inkling2_text", "xglm")  # their forward takes no other precision


def logprobs(model: torch.nn.Module) -> torch.Tensor:
    takes = inspect.signature(type(model).forward).parameters
    tokens = torch.randint(2, zoo.VOCABULARY, (1, 21), generator=torch.Generator().manual_seed(0))
    return model(input_ids=tokens, **({"use_cache": False} if "use_cache" in takes else {})).logits.log_softmax(-1)


def exact(kind: str) -> Policy:
    """A policy of the zoo in float64, in which routers do not flip by rounding. It is made in memory, also of types
    whose folders are refused: their layers are what adapters may meet elsewhere."""
    policy = Policy(zoo.tiny(kind), None, zoo.tokenizer())
    policy.config._attn_implementation = policy.own_attention
    if getattr(policy.trunk, "_can_set_experts_implementation", bool)():
        policy.trunk.set_experts_implementation("eager")
    if kind not in SINGLE:
        policy.trunk.double()
    return policy


@torch.no_grad()
def moved(policy: Policy) -> Policy:
    noise = torch.Generator().manual_seed(1)
    for name, parameter in policy.trunk.named_parameters():
        if ".lora_B." in name:
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=noise))
    return policy


def holds(kind: str) -> None:
    policy, form = exact(kind), kind.partition("/")[0]
    share, left = lora.reach(policy.trunk)
    assert share >= 0.95 or BELOW.get(form, lora.INDEXER) in left.values(), (share, left)
    if form == "reformer":  # it hashes by chance
        return
    merged = copy.deepcopy(policy.trunk)
    before = logprobs(policy.trunk)
    policy.add_lora(4, 8.0)
    assert torch.equal(logprobs(policy.trunk), before)
    on = logprobs(moved(policy).trunk)
    assert (on - before).abs().max() > 0.01
    on.sum().backward()
    idle = [n for n, p in policy.trunk.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert idle == [], idle
    merged.load_state_dict(lora.merged_state(policy.trunk))
    torch.testing.assert_close(logprobs(merged), on, rtol=0, atol=1e-4 if kind in SINGLE else 1e-9)


@pytest.mark.parametrize("kind", FEW)
def test_adapters_are_on_the_linear_layers_begin_as_nothing_and_merge(kind):
    holds(kind)


@pytest.mark.parametrize("kind", [*FEW, "laguna"])
def test_adapters_reach_a_sampler_and_peft(kind, tmp_path):
    policy = exact(kind)
    policy.trunk.float()
    policy.add_lora(4, 8.0)
    pool = open_pool(policy)
    pool.sync_weights(moved(policy).weights(), 1)
    assert checksum(pool.engine.policy.weights()) == checksum(policy.weights())
    zoo.tiny(kind).save_pretrained(tmp_path / "base")
    factors = {n.replace(".default", ""): t for n, t in policy.trunk.state_dict().items() if ".lora_" in n}
    (tmp_path / "adapter").mkdir()
    save_file({f"base_model.model.{n}": t for n, t in factors.items()}, tmp_path / "adapter/adapter_model.safetensors")
    peft_config(policy.trunk, 4, 8.0, str(tmp_path / "base")).save_pretrained(tmp_path / "adapter")
    if kind in ("mamba2", "laguna"):
        with pytest.raises(ExportError, match="peft .*; drop --adapter"):
            _refuse_lost_adapters(policy, tmp_path / "adapter")
        return
    _refuse_lost_adapters(policy, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(logprobs(loaded.base_model.model), logprobs(policy.trunk), rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in (*zoo.kinds(), *zoo.variants()) if kind not in (*FEW, *UNBUILT)])
def test_adapters_of_every_other_type_do_too(kind):
    holds(kind)

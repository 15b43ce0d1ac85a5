"""Compressed MLA: exact where nothing is dropped, and as good as it predicts where something is."""

from __future__ import annotations

import math

import pytest
import torch
from dense_models import MAX_POSITIONS, ROPES, SHAPES, dense_model, random_ids
from transformers import LlamaConfig, LlamaForCausalLM

from policies.conversion.calibration import observe
from policies.conversion.compress import check_sizes, compress, exact_rank
from policies.conversion.parity import Fidelity, fidelity, parity


def learned_model(groups: int = 3, heads: int = 6, head_dim: int = 8, hidden: int = 48) -> LlamaForCausalLM:
    """Keys and values that share few directions, as trained ones do: compression has something to find."""
    dense = dense_model((heads, groups, head_dim, hidden))
    torch.manual_seed(3)
    with torch.no_grad():
        for layer in dense.model.layers:
            for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                u, s, v = torch.linalg.svd(projection.weight, full_matrices=False)
                projection.weight.copy_(u * (s * 0.7 ** torch.arange(len(s))) @ v)
    return dense


@pytest.mark.parametrize("rope", [None, "llama3", "yarn"])
@pytest.mark.parametrize("shape", [SHAPES["mha"], SHAPES["gqa_of_three"], SHAPES["mqa"], SHAPES["smallest"]], ids=str)
def test_the_full_rank_is_exact(shape: tuple[int, int, int, int], rope: str | None) -> None:
    """Every map across groups, metric, root and eigenvector cancels: one transposed or conjugated wrongly shows."""
    dense = dense_model(shape, **({"rope_parameters": dict(ROPES[rope])} if rope else {}))
    moments = observe(dense, list(random_ids(4)))
    converted, split = compress(dense, moments, exact_rank(dense.config), shape[1] * shape[2])
    assert (split.latents, split.error) == (shape[1] * shape[2], pytest.approx(0, abs=1e-9))
    report = parity(dense, converted, random_ids(), new_tokens=6)
    assert report.passed, f"\n{report}"
    assert report.max_logit_difference < 1e-4 * report.max_logit


@pytest.mark.parametrize(("rotary", "unrotated"), [(2, 8), (6, 6), (12, 2)])
def test_keys_lose_nothing_with_a_rotation_that_does_not_turn(rotary: int, unrotated: int) -> None:
    """All but `rotary` dimensions of the key go through the latent, which has room for all of them."""
    dense = dense_model(rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 1e7})
    moments = observe(dense, list(random_ids(4)))
    converted, _ = compress(dense, moments, exact_rank(dense.config), rotary)
    assert converted.config.qk_rope_head_dim == rotary
    assert converted.config.qk_nope_head_dim == unrotated
    report = parity(dense, converted, random_ids(), new_tokens=6)
    assert report.max_logit_difference < 1e-4 * report.max_logit


def test_the_moments_are_those_of_the_attention_itself() -> None:
    dense = dense_model(attn_implementation="eager")
    windows = list(random_ids(2, 20))
    inputs: list[torch.Tensor] = []
    hook = dense.model.layers[1].input_layernorm.register_forward_hook(lambda *args: inputs.append(args[2][0]))
    attended = [dense(window[None], output_attentions=True).attentions[1][0].double() for window in windows]
    hook.remove()
    moments = observe(dense, windows)[1]
    x = [i.double() for i in inputs]
    weights = [a.sum((0, 1)) / len(a) for a in attended]
    torch.testing.assert_close(moments.queries, sum(i.T @ i for i in x) / 40)
    torch.testing.assert_close(moments.keys, sum((i * w[:, None]).T @ i for i, w in zip(x, weights, strict=True)) / 40)
    torch.testing.assert_close(moments.mean, sum(w @ i for i, w in zip(x, weights, strict=True)) / 40)
    frequency = float(dense.model.rotary_emb.inv_freq[1])
    distance = torch.arange(20)[None].double() - torch.arange(20)[:, None]
    turned = torch.polar(torch.ones_like(distance), frequency * distance)
    expected = sum((a[2] * turned).sum() for a in attended) / 40
    torch.testing.assert_close(moments.turn[2, 1], expected, rtol=1e-5, atol=1e-6)


def test_a_smaller_cache_costs_more_and_each_choice_beats_its_neighbours() -> None:
    dense = learned_model()
    windows = list(random_ids(8))
    moments, held_out = observe(dense, windows), list(random_ids(10)[8:])
    kls, errors = [], []
    for rank in (44, 32, 20):
        converted, split = compress(dense, moments, rank)
        assert converted.config.kv_lora_rank + converted.config.qk_rope_head_dim == rank
        assert converted.model.layers[0].self_attn.kv_a_proj_with_mqa.weight.shape[0] == rank
        kls.append(fidelity(dense, converted, held_out).kl_mean)
        errors.append(split.error)
        for other in (2, 2 * len(split.rotary) + 2, 2 * len(split.rotary) - 2):
            if 2 <= other <= min(rank - 6, 24):
                assert compress(dense, moments, rank, other)[1].error >= split.error
    assert 0 < kls[0] < kls[1] < kls[2]
    assert kls[0] < 0.05
    assert errors == sorted(errors)


def test_the_means_of_values_are_carried_exactly() -> None:
    """One latent keeps hardly anything of the values but their mean, which every token then says."""
    dense = dense_model()
    moments = observe(dense, list(random_ids(8)))
    converted, _ = compress(dense, moments, 16 + 1 + 4, 16)
    attention = converted.model.layers[0].self_attn
    normed = attention.kv_a_layernorm(torch.cat([torch.zeros(1), attention.kv_a_proj_with_mqa.bias[1:5]]))
    values = attention.kv_b_proj(normed).view(6, 8)
    expected = (dense.model.layers[0].self_attn.v_proj.weight.double() @ moments[0].mean).view(2, 8)
    torch.testing.assert_close(values, expected.repeat_interleave(3, 0).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ((6, None), r"rank=6 is out of range.*2 · 2 KV heads · 8 = 32.*use 7 to 36"),
        ((37, None), r"rank=37 is out of range"),
        ((20, 3), r"rotary=3 is out of range: with rank=20 use an even number from 2 to 14"),
        ((30, 18), r"rotary=18 is out of range: with rank=30 use an even number from 2 to 16"),
    ],
)
def test_sizes_out_of_range_are_refused_by_name(sizes: tuple[int, int | None], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        check_sizes(dense_model().config, *sizes)


def test_fidelity_against_numbers_worked_by_hand() -> None:
    """Two models whose logits do not depend on the text: log 2 against log 4 on a vocabulary of 4."""
    config = LlamaConfig(
        **{"vocab_size": 4, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1},
        max_position_embeddings=MAX_POSITIONS,
    )
    models = [LlamaForCausalLM(config).eval() for _ in range(2)]
    for model, favoured in zip(models, (1, 0), strict=True):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
            model.model.embed_tokens.weight[:, 0] = 1.0
            model.model.norm.weight[0] = 0.5  # rms of (1, 0, 0, 0) is 1/2: the hidden state is 1
            model.lm_head.weight[:favoured, 0] = math.log(3.0)
    found = fidelity(*models, [torch.tensor([0, 0, 1]), torch.tensor([2, 0])])
    # p = (1/2, 1/6, 1/6, 1/6), q = 1/4 each; scored tokens are 0, 1 and 0
    kl = 0.5 * math.log(2.0) + 0.5 * math.log(4 / 6)
    expected = Fidelity(kl, 1.0, 4.0, (2 * 6 * 2) ** (1 / 3), 5)
    for name, value in vars(expected).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-4), name

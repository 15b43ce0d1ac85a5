"""Dense feed-forward -> experts: the same function, and a router that can learn."""

from __future__ import annotations

import pytest
import torch
from dense_models import dense_model, random_ids
from transformers import DeepseekV3ForCausalLM

from policies.contradictions import contradictions
from policies.conversion.dense import convert_dense
from policies.conversion.experts import ExpertShards, add_noise, shard_feed_forward
from policies.conversion.parity import parity


def converted_model(**changes: object) -> DeepseekV3ForCausalLM:
    return convert_dense(dense_model(**{"intermediate_size": 96} | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "shape",
    [
        ExpertShards(),
        ExpertShards(shared_experts=1, experts_per_group=2, expert_groups=2, dense_layers=0),
        ExpertShards(shared_experts=2, experts_per_group=4, expert_groups=3),
        ExpertShards(shared_experts=9, experts_per_group=3, expert_groups=5, dense_layers=0),
    ],
    ids=lambda shape: f"{shape.shared_experts}+{shape.experts_per_group}x{shape.expert_groups}",
)
def test_every_shape_is_exact(shape: ExpertShards) -> None:
    dense = converted_model()
    sharded = shard_feed_forward(dense, shape)
    report = parity(dense, sharded, random_ids(), new_tokens=6)
    assert report.passed, f"\n{report}"
    assert report.max_logit_difference < 1e-5 * report.max_logit
    config = sharded.config
    assert list(contradictions(config)) == []
    assert config.n_routed_experts == shape.experts_per_group * shape.expert_groups
    experts = sharded.model.layers[1].mlp.experts
    width = 96 // shape.shards
    assert experts.gate_up_proj.shape == (config.n_routed_experts, 2 * width, 48)
    assert experts.down_proj.shape == (config.n_routed_experts, 48, width)
    assert hasattr(sharded.model.layers[0].mlp, "experts") == (shape.dense_layers == 0)


def test_the_router_and_every_expert_that_was_met_have_a_gradient() -> None:
    sharded = shard_feed_forward(converted_model(), ExpertShards(dense_layers=0)).train()
    sharded(random_ids(), labels=random_ids()).loss.backward()
    for layer in sharded.model.layers:
        gradient = layer.mlp.gate.weight.grad
        assert (gradient.norm(dim=1) > 1e-6).all()
        assert (layer.mlp.experts.gate_up_proj.grad.flatten(1).norm(dim=1) > 1e-6).all()
        # rows of a group are weighed against each other: what one gains the other loses
        pairs = gradient.view(4, 2, -1)
        torch.testing.assert_close(pairs[:, 0], -pairs[:, 1], rtol=1e-3, atol=1e-7)


def test_noise_is_a_share_of_each_tensor_and_touches_routed_experts_alone() -> None:
    sharded = shard_feed_forward(converted_model(), ExpertShards())
    before = {name: tensor.clone() for name, tensor in sharded.state_dict().items()}
    add_noise(sharded, 0.01, seed=5)
    for name, tensor in sharded.state_dict().items():
        if ".mlp.experts." in name:
            moved = (tensor - before[name]).square().mean().sqrt() / before[name].square().mean().sqrt()
            assert moved == pytest.approx(0.01, rel=0.05)
        else:
            assert torch.equal(tensor, before[name]), name


def test_the_source_is_left_alone_and_the_seed_decides_the_router() -> None:
    dense = converted_model()
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    one, same, other = (shard_feed_forward(dense, ExpertShards(), seed) for seed in (0, 0, 1))
    add_noise(one, 0.5)
    assert dense.config.first_k_dense_replace == 2
    for name, tensor in dense.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    routers = [model.model.layers[1].mlp.gate.weight for model in (one, same, other)]
    assert torch.equal(routers[0], routers[1])
    assert not torch.equal(routers[0], routers[2])


@pytest.mark.parametrize(
    ("shape", "named"),
    [
        (ExpertShards(experts_per_group=1), "experts_per_group=1: .*two best experts; use 2 or more"),
        (ExpertShards(expert_groups=1), "expert_groups=1: .*use 2 or more"),
        (ExpertShards(shared_experts=0), "shared_experts=0: .*use 1 or more"),
        (ExpertShards(dense_layers=-1), "dense_layers=-1: "),
        (ExpertShards(dense_layers=2), "dense_layers=2 leaves no layer of num_hidden_layers=2.*use 1 or less"),
        (
            ExpertShards(shared_experts=3),
            r"intermediate_size=96 .*experts_per_group = 5; sums that divide it are 3, 4,",
        ),
        (ExpertShards(experts_per_group=6), "intermediate_size=96 .*rows of 12 numbers.*multiple of 8"),
    ],
    ids=lambda value: "" if isinstance(value, str) else None,
)
def test_what_does_not_fit_is_refused_by_name(shape: ExpertShards, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        shard_feed_forward(converted_model(), shape)

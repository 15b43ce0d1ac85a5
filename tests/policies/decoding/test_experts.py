"""Routing and expert dispatch of the decode path against transformers' own router and experts."""

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts, DeepseekV3TopkRouter

from policies.decoding.experts import route, run_experts


def config(**given) -> DeepseekV3Config:
    sizes = {"hidden_size": 16, "moe_intermediate_size": 12, "n_routed_experts": 8, "num_experts_per_tok": 2}
    return DeepseekV3Config(**sizes | {"n_group": 1, "topk_group": 1} | given)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"num_experts_per_tok": 8},
        {"norm_topk_prob": False, "routed_scaling_factor": 1.0},
        {"n_group": 4, "topk_group": 1},
        {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3},
        {"n_group": 4, "topk_group": 4, "num_experts_per_tok": 5},
        {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 4},
    ],
)
def test_route_equals_the_stock_router(given):
    torch.manual_seed(0)
    chosen = config(**given)
    router = DeepseekV3TopkRouter(chosen)
    with torch.no_grad():
        router.weight.normal_()
        router.e_score_correction_bias.normal_(0, 0.3)  # strong enough to change who is chosen
    x = torch.randn(500, 16)
    logits, stock_weights, stock_experts = router(x)
    weights, experts = route(logits, router.e_score_correction_bias, chosen)
    by_id, stock_by_id = experts.sort(), stock_experts.sort()
    assert torch.equal(by_id.values, stock_by_id.values)  # the order inside a token's choice does not matter
    torch.testing.assert_close(weights.gather(1, by_id.indices), stock_weights.gather(1, stock_by_id.indices))


@pytest.mark.parametrize("tokens", [1, 2, 33])
@pytest.mark.parametrize("used", [range(8), [5], [0, 7], [1, 2, 3]])  # the others get no token
@pytest.mark.parametrize("width", [(16, 12), (12, 20)])  # grouped products want rows of 16 bytes, stock ones too
def test_experts_equal_the_stock_loop(tokens, used, width):
    torch.manual_seed(0)
    hidden, intermediate = width
    experts = DeepseekV3Experts(config(hidden_size=hidden, moe_intermediate_size=intermediate))
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(0, 0.3)
    k = min(2, len(used))
    x, weights = torch.randn(tokens, hidden), torch.rand(tokens, k)
    chosen = torch.stack([torch.tensor(used)[torch.randperm(len(used))[:k]] for _ in range(tokens)])
    with torch.no_grad():
        expected = DeepseekV3Experts.forward.__wrapped__(experts, x, chosen, weights)
        ours = run_experts(x, weights, chosen, experts.gate_up_proj, experts.down_proj)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)

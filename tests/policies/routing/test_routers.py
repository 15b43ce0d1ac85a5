"""What routers of the stock model chose, and which layers have one."""

import torch

from policies.decoding.experts import route
from policies.routing.routers import RoutingRecorder, routers


def test_the_recorder_notes_what_every_router_chose_and_leaves_no_hook(random_policy):
    policy = random_policy(0, mtp=False, first_k_dense_replace=0, n_routed_experts=6)
    token_ids = torch.tensor([[4, 5, 6]])
    with torch.no_grad(), RoutingRecorder(policy.trunk) as recorder:
        out = policy.trunk(token_ids, output_router_logits=True)
    assert [experts.shape for experts in recorder.experts] == [(3, 2), (3, 2)]
    for experts, logits, layer in zip(recorder.experts, out.router_logits, policy.trunk.model.layers, strict=True):
        _, expected = route(logits, layer.mlp.gate.e_score_correction_bias, policy.config)
        assert torch.equal(experts.sort().values, expected.sort().values)
    assert all(torch.equal(a, b) for a, b in zip(recorder.logits, out.router_logits, strict=True))
    with torch.no_grad():
        policy.trunk(token_ids)
    assert len(recorder.experts) == len(recorder.logits) == 2


def test_routers_go_by_the_number_of_their_layer(random_policy):
    policy = random_policy(0, num_hidden_layers=4, first_k_dense_replace=2)
    assert routers(policy.trunk) == {n: policy.trunk.model.layers[n].mlp.gate for n in (2, 3)}
    policy.add_lora(2, 4.0, ["router"])
    assert routers(policy.trunk) == {n: policy.trunk.model.layers[n].mlp.gate.get_base_layer() for n in (2, 3)}

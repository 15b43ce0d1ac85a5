"""Recurrent layers of packed rows give what the model's own forward gives of each row alone, gradients included."""

import pytest
import torch
import zoo

from grpo.learner.batch import collate
from grpo.learner.row import PackedRow, Sample
from policies.logprobs import token_logprobs
from policies.paths import Paths
from policies.policy import checkpoint_layers

KINDS = ("qwen3_5_text", "lfm2", "nemotron_h", "granitemoehybrid", "falcon_h1")
ALSO = ("qwen3_5_moe_text", "qwen3_next", "olmo_hybrid", "kimi_linear", "bamba")
LENGTHS = ((5, (9, 1, 4)), (21, (3, 30)), (5, (3,)), (1, (1, 1)))  # of the prompt and of the completions of each row


def _policy(kind, **changes):
    policy = zoo.policy(kind, **changes)
    policy.paths = Paths("joined", "packed")
    return policy


def _rows():
    torch.manual_seed(0)
    ids = lambda count: torch.randint(2, zoo.VOCABULARY, (count,)).tolist()  # noqa: E731
    return [PackedRow(ids(p), [Sample(c, ids(n)) for c, n in enumerate(counts)]) for p, counts in LENGTHS]


def _packed(policy):
    mini = collate(_rows(), torch.device("cpu"))
    hidden = policy.hidden(mini.token_ids, mini.position_ids, mini.segment)
    preceding = hidden.gather(1, mini.before[..., None].expand_as(hidden))[mini.scored]
    return token_logprobs(policy.output.logits(preceding), mini.token_ids[mini.scored])


def _own(policy):
    logprobs = []
    for row in _rows():
        for sample in row.samples:
            ids = torch.tensor(row.prompt_token_ids + sample.token_ids)
            scores = policy.trunk(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
            logprobs.append(scores[:-1].gather(1, ids[1:, None])[len(row.prompt_token_ids) - 1 :, 0])
    return torch.cat(logprobs)


def _with_gradients(policy, logprobs_of):
    policy.zero_grad()
    logprobs = logprobs_of(policy)
    (logprobs * torch.linspace(-1, 1, len(logprobs))).sum().backward()
    gradients = {name: p.grad.clone() for name, p in policy.trunk.named_parameters() if p.grad is not None}
    return logprobs.detach(), gradients


def _agree(policy):
    (packed, gradients), (own, wanted) = (_with_gradients(policy, way) for way in (_packed, _own))
    difference = (packed - own).abs()
    assert difference.mean() < 3e-6
    most = 5e-5 if policy.config.model_type == "qwen3_5_moe_text" else 2e-5  # one of its tokens: 2.1e-5
    assert difference.max() < most
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (gradients[name] - gradient).norm() <= 1e-4 * gradient.norm() + 2e-5, name


@pytest.mark.parametrize("kind", [*KINDS, *(pytest.param(kind, marks=pytest.mark.slow) for kind in ALSO)])
def test_contract_10_a_recurrent_model_reads_packed_rows_as_each_row_alone(kind):
    policy = _policy(kind)
    assert policy.recurrent
    _agree(policy)


def test_layers_that_are_computed_again_and_adapters_in_a_mixer_agree_too():
    policy = _policy("qwen3_5_text")
    policy.add_lora(4, 8.0)
    adapted = [p for name, p in policy.trunk.named_parameters() if "linear_attn" in name and "lora_B" in name]
    assert adapted
    with torch.no_grad():
        for p in adapted:
            p.normal_(std=0.3)
    checkpoint_layers(policy.trunk)
    _agree(policy)


def test_a_copy_reads_by_its_own_mixers():
    policy = _policy("lfm2")
    copy = policy.sharing(head=False)
    policy.paths = Paths("joined", "alone")
    with torch.no_grad():
        before = _packed(copy)
        for parameter in policy.sharing(head=False).parameters():
            assert parameter.data_ptr() in {p.data_ptr() for p in policy.parameters()}
        for module in policy.trunk.modules():
            if "ShortConv" in type(module).__name__:
                module.conv = torch.nn.Conv1d(64, 64, 3, groups=64, bias=False)
        assert torch.equal(_packed(copy), before)
        assert not torch.equal(_packed(policy), before)

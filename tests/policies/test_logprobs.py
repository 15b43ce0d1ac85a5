"""Log-probabilities against log_softmax, by hand, and a proof that memory does not scale with N · V."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from policies.lm_head import LMHead, scale_and_cap
from policies.logprobs import CHUNK, logprobs_from_hidden, shifted_logprobs, token_logprobs


def reference(logits, token_ids, temperature):
    log_softmax = (logits.float() / temperature).log_softmax(-1)
    return log_softmax.gather(-1, token_ids[..., None]).squeeze(-1), -(log_softmax.exp() * log_softmax).sum(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, CHUNK, 1), (0,)])  # the third takes more than one chunk
def test_equals_log_softmax(shape, dtype):
    torch.manual_seed(0)
    logits, token_ids = 5 * torch.randn(*shape, 11, dtype=dtype), torch.randint(11, shape)
    logprobs, _ = reference(logits, token_ids, 0.7)
    assert token_logprobs(logits, token_ids, 0.7).dtype == torch.float32
    torch.testing.assert_close(token_logprobs(logits, token_ids, 0.7), logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("elements", [1, 9])  # 1: a tile has no other logit than this
@pytest.mark.parametrize("entropy_grad", [False, True])
def test_from_hidden_takes_a_logit_that_overflows(entropy_grad, elements):
    """In half precision 300 · -300 is -∞; that token's row learns nothing and spoils nothing."""
    hidden = torch.tensor([[300.0]], dtype=torch.float16, requires_grad=True)
    head = torch.tensor([[-300.0], [0.0], [-0.001]], dtype=torch.float16, requires_grad=True)
    how = {"elements": elements, "entropy_grad": entropy_grad}
    logprobs, entropies = logprobs_from_hidden(hidden, head, torch.tensor([1]), **how)
    kept = (head.detach()[1:] @ hidden.detach().T)[:, 0].float()
    distribution = torch.distributions.Categorical(logits=kept)
    assert logprobs.item() == pytest.approx(distribution.log_prob(torch.tensor(0)).item(), abs=1e-6)
    assert entropies.item() == pytest.approx(distribution.entropy().item(), abs=1e-6)
    (logprobs + 7 * entropies if entropy_grad else logprobs).sum().backward()
    p, h = distribution.probs, distribution.entropy()
    slopes = torch.tensor([1.0, 0.0]) - p - (7 * p * (p.log() + h) if entropy_grad else 0)
    assert head.grad[0].item() == 0
    assert torch.allclose(head.grad[1:, 0].float(), 300 * slopes, rtol=2e-3)
    assert hidden.grad.isfinite().all()


def test_the_shift_scores_each_token_by_the_logits_before_it():
    torch.manual_seed(0)
    logits, token_ids = torch.randn(2, 4, 6), torch.randint(6, (2, 4))
    shifted = shifted_logprobs(logits, token_ids, 1.3)
    for row in range(2):
        for t in range(1, 4):
            expected = (logits[row, t - 1] / 1.3).log_softmax(-1)[token_ids[row, t]]
            assert shifted[row, t - 1].item() == pytest.approx(expected.item(), abs=1e-6)


def test_misaligned_input_is_refused():
    with pytest.raises(ValueError, match="not aligned.*shifted_logprobs"):
        token_logprobs(torch.zeros(2, 4, 6), torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="temperature=0.0 must be positive"):
        token_logprobs(torch.zeros(4, 6), torch.zeros(4, dtype=torch.long), temperature=0.0)


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("entropy_grad", [False, True])
def test_logits_that_are_scaled_shifted_and_capped_have_the_gradients_of_plain_torch(scale, cap, entropy_grad):
    torch.manual_seed(0)
    token_ids, upstream = torch.randint(13, (23,)), torch.randn(2, 23)
    leaves = [torch.randn(shape, requires_grad=True) for shape in ((23, 8), (13, 8), (13,))]

    def run(score):
        logprobs, entropies = score(*leaves)
        loss = (upstream[0] * logprobs).sum() + (upstream[1] * entropies).sum() * entropy_grad
        return logprobs, entropies, *torch.autograd.grad(loss, leaves)

    def plain(hidden, weight, bias):
        logits = scale * (hidden @ weight.T + bias)
        return reference(logits if cap is None else cap * torch.tanh(logits / cap), token_ids, 0.7)

    def ours(hidden, weight, bias):
        head = LMHead(weight, bias, scale, cap)
        logprobs, entropies = logprobs_from_hidden(hidden, head, token_ids, 0.7, elements=30, entropy_grad=entropy_grad)
        return logprobs, entropies

    for values in zip(run(ours), run(plain), strict=True):
        torch.testing.assert_close(*values, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "fields", "expected"),
    [
        ("llama", {}, (1.0, None)),
        ("cohere", {"logit_scale": 0.0625}, (0.0625, None)),
        ("granite", {"logits_scaling": 8}, (0.125, None)),  # divided
        ("hyperclovax", {"logits_scaling": 8}, (8.0, None)),  # multiplied
        ("gemma2", {"final_logit_softcapping": 30.0}, (1.0, 30.0)),
        ("muse_glimmer", {"output_multiplier": 0.5, "final_logit_softcapping": 20.0}, (0.5, 20.0)),
    ],
)
def test_what_is_done_to_logits_is_read_from_the_configuration(kind, fields, expected):
    assert scale_and_cap(SimpleNamespace(model_type=kind, **fields)) == expected


def test_the_gradient_of_the_lm_head_does_not_lose_bits_with_every_tile():
    """In bf16: about as near to exact in 195 tiles as in one. Each tile is rounded, their sum is not."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(97 * 4, 32).bfloat16(), (0.2 * torch.randn(50, 32)).bfloat16()
    token_ids, upstream = torch.randint(50, (97 * 4,)), torch.randn(97 * 4)

    def gradient(dtype, elements):
        head = weight.to(dtype).requires_grad_()
        logprobs, _ = logprobs_from_hidden(hidden.to(dtype), head, token_ids, elements=elements)
        [of_head] = torch.autograd.grad((upstream * logprobs).sum(), head)
        assert of_head.dtype == dtype
        return of_head.double()

    exact = gradient(torch.float64, 97 * 4 * 50)
    ours = [gradient(torch.bfloat16, elements) for elements in (97 * 4 * 50, 100)]
    errors = [((found - exact).norm() / exact.norm()).item() for found in ours]
    assert errors[0] < 0.003
    assert errors[1] < 1.4 * errors[0]  # summed in bf16 it is 3.2 times as large


def test_from_hidden_without_tokens_or_gradient():
    with torch.no_grad():
        logprobs, entropies = logprobs_from_hidden(torch.zeros(3, 2), torch.zeros(4, 2), torch.tensor([0, 1, 3]))
    assert torch.allclose(logprobs.exp(), torch.full((3,), 0.25))
    assert not logprobs.requires_grad
    logprobs, entropies = logprobs_from_hidden(torch.zeros(0, 2), torch.zeros(4, 2), torch.zeros(0, dtype=torch.long))
    assert logprobs.shape == entropies.shape == (0,)


@pytest.mark.parametrize("elements", [4, 9, 1 << 22])
def test_contract_6_the_logprob_of_an_id_that_no_token_has_is_nan(elements):
    ids = torch.tensor([-1, 0, 4, 3])
    logprobs, _ = logprobs_from_hidden(torch.zeros(4, 2), torch.zeros(4, 2), ids, elements=elements)
    assert logprobs.isnan().tolist() == [True, False, True, False]


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("entropy_grad", [False, True])
def test_memory_does_not_scale_with_tokens_times_vocabulary(entropy_grad):
    num_tokens, width, vocabulary, elements = 128, 4, 100, 800
    hidden = torch.randn(num_tokens, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    token_ids, saved = torch.randint(vocabulary, (num_tokens,)), []

    def pack(tensor):
        saved.append(tensor.numel())
        return tensor

    with LargestTensor() as largest:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logprobs, entropies = logprobs_from_hidden(
                hidden, weight, token_ids, elements=elements, entropy_grad=entropy_grad
            )
        (logprobs.sum() + entropies.sum()).backward()
    assert 0.9 * elements < largest.numel <= elements  # also of the backward pass
    assert sum(saved) < num_tokens * vocabulary  # what waits for the backward pass
    assert hidden.grad is not None
    assert weight.grad is not None


@pytest.mark.parametrize("elements", [1, 14, 700])
def test_several_tokens_of_a_position_are_as_in_log_softmax_with_their_gradients(elements):
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(n, 4, generator=generator, dtype=torch.float64, requires_grad=True) for n in (5, 7))
    asked = torch.randint(7, (5, 3), generator=generator)  # the same twice in a row, too
    assert any(len(set(row)) < 3 for row in asked.tolist())
    found, entropies = logprobs_from_hidden(hidden, head, asked, 0.7, elements=elements, entropy_grad=True)
    whole = (hidden @ head.T / 0.7).log_softmax(-1)
    expected, entropy = whole.gather(-1, asked), -(whole.exp() * whole).sum(-1)
    assert torch.allclose(found, expected)
    assert torch.allclose(entropies, entropy)
    weights = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    ours = torch.autograd.grad((found * weights).sum() + entropies[2], (hidden, head))
    theirs = torch.autograd.grad((expected * weights).sum() + entropy[2], (hidden, head))
    for own, other in zip(ours, theirs, strict=True):
        assert torch.allclose(own, other)

"""Attention by torch's kernels against products and a softmax. The kernel for CUDA has a stand-in here."""

import itertools

import pytest
import torch

from policies.decoding.kernels import cpu_attention, cuda_attention, cuda_attention_agrees, plain_attention

CPU = torch.device("cpu")
WIDTHS = [(8, 5), (3, 5), (5, 5), (2, 6)]
SIZES = 16, 24, 16  # of keys, vectors and values


def inputs(key_width: int, entries: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    query, cached = torch.randn(3, 4, key_width), torch.randn(3, entries + 2, 8)[:, :entries]
    visible = torch.rand(3, 4, entries) < 0.6
    visible[:, :, 0] = True
    visible[1, 2] = False  # sees nothing
    return query, cached, torch.zeros(visible.shape).masked_fill(~visible, -torch.inf), visible


@pytest.mark.parametrize(("key_width", "value_width"), WIDTHS)
def test_the_kernel_for_a_cpu_computes_what_plain_operators_do(key_width, value_width):
    query, cached, mask, visible = inputs(key_width)
    fused, plain = (f(query, cached, value_width, mask) for f in (cpu_attention, plain_attention))
    sees = visible.any(-1)
    torch.testing.assert_close([x[sees] for x in fused], [x[sees] for x in plain])
    assert fused[0].isfinite().all()
    assert plain[0].isfinite().all()
    scores = torch.einsum("bnk,btk->bnt", query, cached[..., -key_width:]).where(visible, -torch.inf)
    torch.testing.assert_close(plain[0][sees], (scores.softmax(-1) @ cached[..., :value_width])[sees])
    torch.testing.assert_close(plain[1][..., 0][sees], scores.logsumexp(-1)[sees])


class Kernel:
    """What torch's memory-efficient kernel takes and gives, and what it refuses: a mask whose rows are not aligned."""

    def __init__(self, wrong: float = 0.0) -> None:
        self.wrong, self.calls = wrong, 0

    def __call__(self, query, keys, values, bias, sums, *, scale):
        self.calls += 1
        assert query.shape[1] == keys.shape[1] == values.shape[1] == bias.shape[1] == 1
        assert bias.shape == (*query.shape[:3], keys.shape[2])
        assert bias.dtype == query.dtype
        assert bias.stride(-1) == 1
        if any(stride % 16 for stride, size in zip(bias.stride()[:-1], bias.shape, strict=False) if size > 1):
            raise RuntimeError("attn_bias is not correctly aligned (strideM).")
        dtype, (query, keys, values, bias) = query.dtype, (x.float() for x in (query, keys, values, bias))
        scores = scale * query @ keys.transpose(2, 3) + bias  # in float32, also of bf16
        total = scores.logsumexp(-1)
        padded = torch.full((*total.shape[:2], -(-total.shape[2] // 32) * 32), torch.inf)
        padded[..., : total.shape[2]] = total + self.wrong
        return (scores.softmax(-1) @ values).to(dtype), padded, torch.zeros(()), torch.zeros(())


@pytest.fixture
def use(monkeypatch):
    """Puts a kernel in the place of torch's, and forgets what was found of the one before."""
    cuda_attention_agrees.cache_clear()
    yield lambda kernel: monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_efficient_attention", kernel)
    cuda_attention_agrees.cache_clear()


@pytest.mark.parametrize(
    ("key_width", "value_width", "entries", "shared"),
    [(*widths, *rest) for widths in WIDTHS for rest in itertools.product((7, 16), (False, True))],
)
def test_the_kernel_for_cuda_gets_what_it_takes(use, key_width, value_width, entries, shared):
    """Masks of any length, of every query or of all queries of a row."""
    use(Kernel())
    query, cached, mask, visible = inputs(key_width, entries)
    if shared:
        mask, visible = mask[:, :1], visible[:, :1].expand(-1, 4, -1)
    sees = visible.any(-1)
    fused, plain = (f(query, cached, value_width, mask) for f in (cuda_attention, plain_attention))
    assert [x.shape for x in fused] == [x.shape for x in plain]
    torch.testing.assert_close([x[sees] for x in fused], [x[sees] for x in plain])
    assert fused[0].isfinite().all()


def test_a_kernel_is_tried_once_for_each_size(use, recwarn):
    kernel = Kernel()
    use(kernel)
    assert [cuda_attention_agrees(CPU, torch.float32, SIZES) for _ in range(3)] == [True] * 3
    assert kernel.calls == 1
    assert cuda_attention_agrees(CPU, torch.bfloat16, SIZES)
    assert kernel.calls == 2
    assert not recwarn.list


def test_a_kernel_that_is_wrong_or_not_there_is_not_used_and_a_warning_says_why(use):
    """Torch has none for a CPU under this name."""
    with pytest.warns(UserWarning, match=r"not used .*_scaled_dot_product_efficient_attention.*Plain products"):
        assert not cuda_attention_agrees(CPU, torch.float32, SIZES)
    cuda_attention_agrees.cache_clear()
    use(Kernel(wrong=0.01))
    with pytest.warns(UserWarning, match=r"kernel is not used on cpu .* 24 numbers in torch.float32: .*0\.01 from"):
        assert not cuda_attention_agrees(CPU, torch.float32, SIZES)

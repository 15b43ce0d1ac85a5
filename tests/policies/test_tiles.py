"""What flex attention is compiled for, without a GPU: lengths, options and what happens where no option fits."""

import warnings

import pytest
import torch

from policies import attention, tiles
from policies.attention import Packing

CPU = torch.device("cpu")


def test_rows_have_few_lengths_and_little_padding():
    lengths = [tiles.length_of(tokens) for tokens in range(1, 32_769)]
    assert len(set(lengths)) == 28
    assert all(length >= tokens for tokens, length in enumerate(lengths, 1))
    assert all(length - tokens < max(tiles.TILE, length / 5) for tokens, length in enumerate(lengths, 1))
    assert all(length % tiles.TILE == 0 for length in lengths)


def _attend(too_large):
    """An attention whose kernels have no place with tiles of `too_large` and more."""
    tried = []

    def attend(query, key, value, *, block_mask, kernel_options, scale, return_aux):
        tried.append(kernel_options.get("BLOCK_N1", 128))
        if tried[-1] >= too_large:
            raise RuntimeError("out of resource: shared memory, Required: 279808, Hardware limit: 166912\nmore")
        return value, type("Aux", (), {"lse": query.sum(-1)})

    return attend, tried


@pytest.mark.parametrize(("too_large", "expected"), [(999, [128]), (128, [128, 64]), (33, [128, 64, 32])])
def test_smaller_tiles_are_tried_where_shared_memory_does_not_suffice(too_large, expected):
    attend, tried = _attend(too_large)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        options = tiles.kernel_options(attend, CPU, torch.float32, 192, 128)
        assert tiles.kernel_options(attend, CPU, torch.float32, 192, 128) is options  # tried once
    assert tried == expected
    assert options is not None
    assert options.get("BLOCK_M", 128) == expected[-1]
    assert ("num_stages" in options) == (len(expected) > 1)


def test_where_nothing_fits_rows_attend_under_a_dense_mask(monkeypatch):
    attend, tried = _attend(0)
    monkeypatch.setattr(attention, "_by_tiles", lambda tensor: True)
    monkeypatch.setattr(attention, "compile_friendly_flex_attention", attend)
    packing = Packing(torch.tensor([[0, 0, 0, 1, 1, 2, 2, -1]]))
    query, key, value = (torch.randn(1, 2, 8, width, requires_grad=True) for width in (12, 12, 8))
    mask = packing.mask_for(attention.ATTENTION, torch.float32)
    module = torch.nn.Module()
    with pytest.warns(
        UserWarning, match="flex attention is not used on cpu for keys of 12 and .* Required: 279808.* dense mask"
    ):
        out = attention.attend(module, query, key, value, mask, 0.5, packing=packing)[0]
    assert tried == [128, 64, 32, 16]
    scores = (query @ key.transpose(2, 3) * 0.5).masked_fill(~packing.visible[:, None], -torch.inf)
    torch.testing.assert_close(out, (scores.softmax(-1) @ value).transpose(1, 2))
    alone = attention.attend(module, query, key, value, mask, 0.5)[0]  # a model that does not hand the packing on
    torch.testing.assert_close(alone, out)
    by_blocks = attention.packed_attention(query, key, value, packing, 0.5)[0]
    torch.testing.assert_close(by_blocks[:, :7], out[:, :7])


def test_full_memory_is_not_taken_for_a_kernel_that_does_not_fit():
    def attend(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        tiles.kernel_options(attend, CPU, torch.float32, 64, 64)


def test_passing_torchs_limit_of_shapes_is_an_error():
    assert torch._dynamo.config.fail_on_recompile_limit_hit
    assert torch._dynamo.config.recompile_limit >= 64

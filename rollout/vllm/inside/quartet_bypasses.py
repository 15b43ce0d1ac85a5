"""The faults of vLLM 0.32 on a CPU that change log-probabilities silently, and how each of them is avoided.

vLLM's own interpreter reads this file. Each bypass has a test, marked `peer`, that fails when vLLM computes the right
thing without it: then the bypass goes. Every one of them is harmless where the fault is mended. What only looks mended
is found by the comparison with the learner's log-probabilities.

rotary    its rotary kernel rotates the three-dimensional queries of MLA wrongly: PyTorch's operators do it instead
drafts    `expand_batch_to_tokens` loses its result, so drafts at T > 0 are judged at temperatures never written
experts   reloading weights leaves the experts of an MoE layer unpacked, since their kernel is kept
head      reloading weights keeps the packed copy of an output head that is tied to the embedding
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

TRIED = ("0.32.0",)  # the versions whose log-probabilities were compared with the learner's
ALL = frozenset({"rotary", "drafts", "experts", "head"})


def before_start(chosen: frozenset[str], arguments: dict[str, Any]) -> None:
    """Completes the arguments of vLLM's constructor, and replaces the function that loses its result."""
    if "rotary" in chosen:
        compilation = arguments.setdefault("compilation_config", {})
        compilation.setdefault("custom_ops", []).append("-rotary_embedding")
    if "drafts" in chosen:
        import vllm.v1.sample.rejection_sampler as sampler

        if not callable(getattr(sampler, "expand_batch_to_tokens", None)):
            raise RuntimeError("this vLLM has no expand_batch_to_tokens: the bypass `drafts` does not fit it")
        sampler.expand_batch_to_tokens = _expand


def allow_any_temperature() -> None:
    """vLLM takes requests at temperatures up to 2. Canaries are hotter, so that a sure policy hides no fault."""
    from vllm import SamplingParams

    checked = SamplingParams._verify_args

    def verify(self: SamplingParams) -> None:
        temperature = self.temperature
        self.temperature = min(temperature, 2.0)
        try:
            checked(self)
        finally:
            self.temperature = temperature

    SamplingParams._verify_args = verify


def _expand(x: torch.Tensor, ends: torch.Tensor, count: int, replace_from: int = 0, replace_to: int = 0):
    """Expands [a, b] with ends [2, 5] -> [a, a, b, b, b], where `replace_to` takes the place of `replace_from`."""
    import torch

    expanded = x.repeat_interleave(torch.diff(ends, prepend=ends.new_zeros(1)).long())
    return torch.where(expanded == replace_from, torch.full_like(expanded, replace_to), expanded)


def before_reload(chosen: frozenset[str], model: torch.nn.Module) -> None:
    if "experts" in chosen:
        for method in _methods(model):
            if getattr(method, "moe_kernel", None) is not None:
                method.moe_kernel = None


def after_reload(chosen: frozenset[str], model: torch.nn.Module, tied: bool) -> None:
    if "head" in chosen and tied:
        model.lm_head.weight = model.model.embed_tokens.weight
        model.lm_head.quant_method.process_weights_after_loading(model.lm_head)


def _methods(model: torch.nn.Module) -> Iterator[Any]:
    return (module.quant_method for module in model.modules() if getattr(module, "quant_method", None) is not None)

"""fp32 masters of weights that compute in a lower precision.

bf16 keeps 8 bits: a weight of 0.1 next differs by 0.0005, so an update of 1e-6 is rounded away, every time. The
optimizer therefore moves fp32 copies; policy, reference and sampler compute with their rounded values. Without copies
it must round by chance (`adamw_8bit_stochastic`): then the mean of many steps is exact, though one step is not.

The optimizer alone needs whole masters. From one update to the next a bf16 weight has the upper half of its master
already, so the lower half is enough to have it again with the same bits: 2 bytes a weight instead of 4.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class MasterWeights:
    """Holds a copy of each trained parameter that is not fp32 already; without any, it costs nothing.

    >>> masters = MasterWeights(policy)                 # bf16
    >>> optimizer = torch.optim.AdamW([masters.of(p) for p in policy.parameters()])
    >>> masters.backward(loss)                          # for every micro-batch: gradients add up in fp32
    >>> optimizer.step(); masters.write_back()
    """

    def __init__(self, module: nn.Module, *, rounds: bool = False) -> None:
        """Copies the weights that are not fp32. With `rounds` there are no copies, and gradients alone are fp32."""
        low = [p for p in module.parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)]
        self.pairs = [] if rounds else [(p, p.detach().float()) for p in low]
        self.rounded = low if rounds else []
        for parameter in self.rounded:  # FSDP brings its gradients in the precision of the weights
            parameter.grad_dtype = None if isinstance(parameter, DTensor) else torch.float32
        self._of = {id(p): master for p, master in self.pairs}
        # Lower halves of masters that are not whole, and places where upper ones are others than rounding has left.
        self._rests: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def of(self, parameter: Tensor) -> Tensor:
        """Gives what the optimizer moves in place of this parameter, whole."""
        master = self._of.get(id(parameter), parameter)
        if id(parameter) in self._rests:
            lower, places, others = self._rests.pop(id(parameter))
            master.untyped_storage().resize_(2 * lower.nbytes)
            of_master, upper = _halves(master)
            of_master.copy_(lower)
            upper.copy_(_upper(parameter, lower))
            upper[places] = others
        return master

    @torch.no_grad()
    def halve(self) -> None:
        """Keep the lower halves of masters alone, until `of` gives them. No parameter may change meanwhile."""
        for parameter, master in self.pairs:
            plain = not isinstance(parameter, DTensor) and parameter.is_contiguous()
            if plain and parameter.dtype == torch.bfloat16 and id(parameter) not in self._rests:
                of_master, upper = _halves(master)
                lower = of_master.clone()
                places = (_upper(parameter, lower) != upper).nonzero()[:, 0]  # few: halves of a last place, see tests
                self._rests[id(parameter)] = lower, places, upper[places]
                master.untyped_storage().resize_(0)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss to those of the masters, in fp32. Each leaves its parameter as soon as it is
        there, so the rounded ones are never in memory beside the sums (FSDP brings the shards at the end)."""
        plain = [parameter for parameter, _ in self.pairs if not isinstance(parameter, DTensor)]
        hooks = [parameter.register_post_accumulate_grad_hook(self._take) for parameter in plain]
        try:
            loss.backward()
        finally:
            for hook in hooks:
                hook.remove()
        for parameter, _ in self.pairs:
            if parameter.grad is not None:
                self._take(parameter)
        for parameter in self.rounded:
            if parameter.grad is not None:
                parameter.grad = parameter.grad.float()

    def _take(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        master = self._of[id(parameter)]
        master.grad = parameter.grad.float() if master.grad is None else master.grad.add_(parameter.grad)
        parameter.grad = None

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the masters into the parameters. Those that are not whole have not moved."""
        for parameter, master in self.pairs:
            if id(parameter) not in self._rests:
                parameter.copy_(master)


def _halves(master: Tensor) -> tuple[Tensor, Tensor]:
    """The lower and the upper 16 bits of each number [N], as views; where bytes stand the other way round nothing is
    spared, and nothing is wrong."""
    lower, upper = master.view(-1).view(torch.int16).view(-1, 2).unbind(1)
    return lower, upper


def _upper(parameter: Tensor, lower: Tensor) -> Tensor:
    """The upper halves of masters that were rounded to the nearest bf16: of a lower half above the middle, which is
    negative as an int16, up."""
    return parameter.detach().view(-1).view(torch.int16) + (lower >> 15)

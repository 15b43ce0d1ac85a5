"""fp32 masters of weights that compute in a lower precision.

bf16 keeps 8 bits: a weight of 0.1 next differs by 0.0005, so an update of 1e-6 is rounded away, every time. The
optimizer therefore moves fp32 copies; policy, reference and sampler compute with their rounded values. Without copies
it must round by chance (`adamw_8bit_stochastic`): then the mean of many steps is exact, though one step is not.
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

    def of(self, parameter: Tensor) -> Tensor:
        """Gives what the optimizer moves in place of this parameter."""
        return self._of.get(id(parameter), parameter)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss to those of the masters, in fp32. Each leaves its parameter as soon as it is
        there, so the rounded ones are never in memory beside the sums (FSDP brings the shards at the end)."""
        plain = [parameter for parameter, _ in self.pairs if not isinstance(parameter, DTensor)]
        hooks = [parameter.register_post_accumulate_grad_hook(self._take_gradient) for parameter in plain]
        try:
            loss.backward()
        finally:
            for hook in hooks:
                hook.remove()
        for parameter, _ in self.pairs:
            if parameter.grad is not None:
                self._take_gradient(parameter)
        for parameter in self.rounded:
            if parameter.grad is not None:
                parameter.grad = parameter.grad.float()

    def _take_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        master = self._of[id(parameter)]
        master.grad = parameter.grad.float() if master.grad is None else master.grad.add_(parameter.grad)
        parameter.grad = None

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the masters into the parameters."""
        for parameter, master in self.pairs:
            parameter.copy_(master)

"""fp32 masters of weights that compute in a lower precision.

bf16 keeps 8 bits: a weight of 0.1 next differs by 0.0005, so an update of 1e-6 is rounded away, every time. The
optimizer therefore moves fp32 copies; policy, reference and sampler compute with their rounded values.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MasterWeights:
    """Holds a copy of each trained parameter that is not fp32 already; without any, it costs nothing.

    >>> masters = MasterWeights(policy)                 # bf16
    >>> optimizer = torch.optim.AdamW([masters.of(p) for p in policy.parameters()])
    >>> loss.backward(); masters.take_gradients()       # after every micro-batch: they add up in fp32
    >>> optimizer.step(); masters.write_back()
    """

    def __init__(self, module: nn.Module) -> None:
        rounded = [p for p in module.parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)]
        self.pairs = [(p, p.detach().float()) for p in rounded]
        self._of = {id(p): master for p, master in self.pairs}

    def of(self, parameter: Tensor) -> Tensor:
        """What the optimizer moves in place of this parameter."""
        return self._of.get(id(parameter), parameter)

    def take_gradients(self) -> None:
        """Move gradients from the parameters to their masters, added to what is there."""
        for parameter, master in self.pairs:
            if parameter.grad is not None:
                gradient = parameter.grad.float()
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                parameter.grad = None

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the masters into the parameters."""
        for parameter, master in self.pairs:
            parameter.copy_(master)

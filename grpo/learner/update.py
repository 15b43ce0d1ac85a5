"""One optimizer step: gradients are summed over the ranks, clipped, and move the masters of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from grpo.config.learner import LearnerOptions
from grpo.learner.master_weights import MasterWeights
from grpo.learner.optimizer import by_mesh, norm_of
from grpo.learner.parallel import Ranks
from grpo.run.memory_errors import phase
from policies.devices import fetch


class NonFiniteStep(RuntimeError):
    """Loss or gradient is NaN or infinite. No step was taken."""

    everywhere = True  # every rank raises it


class Update:
    """AdamW over the groups of parameters that move, and the masters that it moves in place of lower precisions.

    `count` is how many steps this object has made.
    """

    def __init__(
        self, masters: MasterWeights, groups: Sequence[dict], options: LearnerOptions, schedule: Callable[[int], float]
    ) -> None:
        """`groups` have `params`, `peak` (the learning rate at its highest) and `weight_decay`; `schedule(step)` is the
        factor of the peak."""
        self.masters, self.options, self.schedule, self.count = masters, options, schedule, 0
        moved = []
        for group in groups:
            parameters = [masters.of(parameter) for parameter in group["params"]]
            moved += [group | {"params": part, "lr": group["peak"]} for part in by_mesh(parameters)]
        self.optimizer: torch.optim.Optimizer
        if options.optimizer != "adamw":
            from grpo.learner.eight_bit import adamw_8bit

            self.optimizer = adamw_8bit(moved, options.betas, rounds=options.rounds)
        else:
            self.optimizer = torch.optim.AdamW(moved, betas=options.betas, fused=True)  # no temporaries

    def zero(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor, step: int, ranks: Ranks) -> None:
        """Raises NonFiniteStep; with several ranks, all of them see it in the gradient of the whole batch."""
        if ranks.size == 1 and not math.isfinite(loss.item()):
            raise NonFiniteStep(f"step {step}: the loss is {loss.item()}")
        self.masters.backward(loss * ranks.readers)  # gradients are averaged over them

    def make(
        self, step: int, ranks: Ranks, modules: Mapping[str, nn.Module], learning_rate: float | None = None
    ) -> dict[str, float]:
        """Clip the gradient of each module by itself, and step with the schedule's learning rates, or with
        `learning_rate` for the trunk, which comes first, and the others in proportion.

        Returns the learning rate and the norms before clipping, by module. Raises NonFiniteStep, and then nothing has
        moved.
        """
        ranks.average_gradients(self._moved())
        read = fetch([self._clip(module) for module in modules.values()])
        norms = {name: norm.item() for name, norm in zip(modules, read, strict=True)}
        if not math.isfinite(sum(norms.values())):
            self.zero()
            trunk, *others = norms
            shown = ", ".join(f"{name}: {norms[name]}" for name in others)
            raise NonFiniteStep(f"step {step}: the gradient norm is {norms[trunk]}" + (f" ({shown})" if shown else ""))
        peak = self.optimizer.param_groups[0]["peak"]
        scale = self.schedule(step) if learning_rate is None else learning_rate / peak
        for group in self.optimizer.param_groups:
            rate, former = group["peak"] * scale, group["lr"]
            group["lr"] = torch.full_like(former, rate) if isinstance(former, Tensor) else rate
        with phase("stepping", SimpleNamespace(learner=self.options)):
            self.optimizer.step()
            moved = list(self._moved())
            torch.autograd.graph.increment_version(moved)  # fused steps do not, and who shares the weights must see it
            self.masters.write_back()
        self.count += 1
        return norms | {"learning_rate": peak * scale}

    def _moved(self) -> Iterator[Tensor]:
        """The tensors that the optimizer moves."""
        return chain.from_iterable(group["params"] for group in self.optimizer.param_groups)

    def _clip(self, module: nn.Module) -> Tensor:
        """Clip the gradient of what the optimizer moves in place of a module's parameters; returns its norm before."""
        moved = [self.masters.of(parameter) for parameter in module.parameters()]
        gradients = [tensor.grad for tensor in moved if tensor.grad is not None]
        # Every rank can have the whole of a gradient where it has a part of the parameter.
        norms = [norm_of(part) for part in by_mesh(gradients)]
        norm = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros((), device=moved[0].device)
        for part in by_mesh(moved):  # torch computes only with what is sharded alike
            nn.utils.clip_grads_with_norm_(part, self.options.max_grad_norm, norm)
        return norm

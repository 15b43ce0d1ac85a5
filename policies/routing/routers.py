"""The routers of a trunk, and a record of what they choose in a forward of the model itself."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor, nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

Part = Literal["mlp", "self_attn"]
PARTS: tuple[Part, ...] = get_args(Part)


def routers(trunk: nn.Module, part: Part = "mlp") -> dict[int, DeepseekV3TopkRouter]:
    """The routers of a trunk's experts (`mlp`) or dynamic heads (`self_attn`) by the number of their layer, in the
    order of a forward."""
    modules = ((name, m) for name, m in trunk.named_modules() if isinstance(m, DeepseekV3TopkRouter))
    named = ((name, m) for name, m in modules if f".{part}.gate" in name)
    return {int(name.split("layers.", 1)[1].split(".", 1)[0]): router for name, router in named}


def has_routers(trunk: nn.Module) -> bool:
    return any(routers(trunk, part) for part in PARTS)


class RoutingRecorder:
    """Context that records the output of every router of a part of `trunk`, one tensor for each layer: the `logits`
    [N, E] with their gradient, and the chosen `experts` [N, k]."""

    def __init__(self, trunk: nn.Module, part: Part = "mlp") -> None:
        self.logits: list[Tensor] = []
        self.experts: list[Tensor] = []
        self._routers = routers(trunk, part).values()

    def __enter__(self) -> RoutingRecorder:
        def note(router: nn.Module, inputs: object, output: tuple[Tensor, Tensor, Tensor]) -> None:
            self.logits.append(output[0])
            self.experts.append(output[2].detach())

        self._hooks = [router.register_forward_hook(note) for router in self._routers]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

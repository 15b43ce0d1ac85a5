"""Our server inside vLLM, sabotaged from one publication to the next: vLLM's interpreter runs this in its place.

    vllm_sabotage.py FILE SERVER ...

FILE names the fault of the next publications and samples; it is empty while there is none. The faults are those of a
server that believes what it says.
"""

import sys
from pathlib import Path
from typing import Any

FILE, SERVER = Path(sys.argv[1]), Path(sys.argv[2])


def fault() -> tuple[str, str]:
    kind, _, name = FILE.read_text().partition(" ")
    return kind, name


def sabotage() -> None:
    """Once vLLM is loaded."""
    import quartet_transfer as transfer
    import torch

    read, after = transfer.tensors.read, transfer.bypasses.after_reload
    receive = transfer.SharedMemory.receive_weights
    last: dict[str, torch.Tensor] = {}
    turned: list[torch.Tensor] = []

    def read_old(path: str, tensors: list[list[Any]]) -> dict[str, torch.Tensor]:
        kind, name = fault()
        found = read(path, tensors)
        if kind == "old":
            found[name] = last[name]
        last.update({key: tensor.clone() for key, tensor in found.items()})
        return found

    def load_others(engine: Any, update: Any) -> None:
        kind, name = fault()
        while turned:
            turned.pop().neg_()
        load = engine.model.load_weights
        if kind == "frozen":
            engine.model.load_weights = list
        elif kind == "skip":
            engine.model.load_weights = lambda weights: load((key, t) for key, t in weights if key != name)
        try:
            receive(engine, update)
        finally:
            engine.model.__dict__.pop("load_weights", None)

    def keep_head(chosen: frozenset[str], model: torch.nn.Module, tied: bool) -> None:
        kind, _ = fault()
        if kind != "untie":
            after(chosen, model, tied)
        for module in model.modules():
            if kind == "rope" and (table := getattr(module, "cos_sin_cache", None)) is not None:
                sin = table.chunk(2, dim=-1)[1]
                if all(sin.data_ptr() != other.data_ptr() for other in turned):
                    turned.append(sin.neg_())

    transfer.tensors.read, transfer.bypasses.after_reload = read_old, keep_head
    transfer.SharedMemory.receive_weights = load_others


def main() -> None:
    sys.path.insert(0, str(SERVER.parent))
    import quartet_server as server

    class Engine(server.Engine):
        def __init__(self, load: dict[str, Any]) -> None:
            super().__init__(load)
            sabotage()

        def sample(self, job: dict[str, Any], said: Any) -> dict[str, Any]:
            if fault()[0] == "hotter":
                job["temperature"] *= 1.25
            return super().sample(job, said)

    server.Engine = Engine
    sys.argv = [str(SERVER), *sys.argv[3:]]
    server.main()


main()

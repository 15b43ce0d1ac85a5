"""Rounds on a GPU: recorded as CUDA graphs and replayed, so that no operator is called by Python.

The round is the function that graph.py has. Recording takes a few eager rounds, so nothing is kept on disk. Where
caches or weights have moved, as when a row ends, it is recorded anew. No GPU has run this yet; tests run all but the
recording on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from policies import devices
from rollout.backends import Decoder
from rollout.compiled.graph import Bucket, Inputs, Round

WARM_UP = 3  # eager rounds before a recording: kernels choose their algorithms and workspaces in them


class RecordedRound:
    """Call it with `Inputs`; it changes the caches among them. It reads everything else from tensors of its own, whose
    addresses the recording has, as it has those of the caches."""

    def __init__(self) -> None:
        self.module: Round | None = None
        self._forget()

    def bind(self, decoder: Decoder, bucket: Bucket) -> None:
        self._forget()
        self.module = Round(replace(decoder, graphs=None), bucket)  # else it would hold itself

    def release(self) -> None:
        self.module = None
        self._forget()

    def _forget(self) -> None:
        self.replay: Callable[[], list[Tensor]] | None = None
        self.small: dict[str, Tensor] = {}
        self.addresses: list[int] = []

    def __call__(self, inputs: Inputs) -> list[Tensor]:
        addresses = [cache.data_ptr() for cache in inputs.caches]
        if self.replay is None or self.addresses != addresses:
            self._forget()
            small = {name: part.clone() for name, part in inputs.others.items()}
            self.replay = self._record(replace(inputs, layers=list(inputs.layers), **small))
            self.small, self.addresses = small, addresses
        for name, part in inputs.others.items():
            self.small[name].copy_(part)
        return [output.clone() for output in self.replay()]

    def _record(self, inputs: Inputs) -> Callable[[], list[Tensor]]:
        module, device = self.module, inputs.last.device
        assert module is not None

        def run() -> list[Tensor]:
            with device:  # on which the round makes its ranges
                return list(module(*inputs.flat()))

        if not devices.has_cuda(device):
            return run
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(WARM_UP):  # a round writes the entries after each row's own: one more changes nothing
                    run()
            torch.cuda.current_stream().wait_stream(aside)
            with torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
                outputs = run()

        def replay() -> list[Tensor]:
            graph.replay()
            return outputs

        return replay

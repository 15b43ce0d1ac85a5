"""Rounds on a GPU: recorded as CUDA graphs and replayed, so that no operator is called by Python.

The round is the function that graph.py has. To record it takes a few eager rounds, so nothing is kept on disk, and where
caches or weights have moved it is recorded anew. No GPU has run this yet; tests run all but the recording on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from rollout.backends import Decoder
from rollout.compiled.graph import Bucket, Inputs, Round

WARM_UP = 3  # eager rounds before a recording: kernels choose their algorithms and workspaces in them


class RecordedRound:
    """Call it with `Inputs`; it changes the caches among them. It reads everything else from tensors of its own, whose
    addresses the recording has, as it has those of the caches."""

    def __init__(self) -> None:
        self.release()

    def bind(self, decoder: Decoder, bucket: Bucket) -> None:
        self.release()
        self.module = Round(decoder, bucket)

    def release(self) -> None:
        self.module: Round | None = None
        self.addresses: list[int] = []
        self.small: Inputs | None = None
        self.replay: Callable[[], list[Tensor]] | None = None

    def __call__(self, given: Inputs) -> list[Tensor]:
        addresses = [cache.data_ptr() for cache in given.caches]
        if self.replay is None or self.small is None or self.addresses != addresses:
            self.small = replace(given, **{name: part.clone() for name, part in given.others.items()})
            self.replay, self.addresses = self._record(self.small), addresses
        for name, part in given.others.items():
            getattr(self.small, name).copy_(part)
        return [found.clone() for found in self.replay()]

    def _record(self, given: Inputs) -> Callable[[], list[Tensor]]:
        module, device = self.module, given.last.device
        assert module is not None

        def run() -> list[Tensor]:
            with device:  # on which the round makes its ranges
                return list(module(*given.flat()))

        if device.type != "cuda":
            return run
        # A round writes the entries after each row's own, so that one more changes nothing.
        aside = torch.cuda.Stream(device)
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                run()
        torch.cuda.current_stream(device).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = run()

        def replay() -> list[Tensor]:
            graph.replay()
            return found

        return replay

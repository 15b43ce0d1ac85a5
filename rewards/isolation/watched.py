"""A reward function that is watched, as it runs in a worker process: what it changes, prints and keeps."""

from __future__ import annotations

import copy
import gc
import os
import tempfile
import tracemalloc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import IO, Any

from rewards.isolation.child import LoadedReward

CALLS = 4  # after so many calls its caches are full, and each of so many further ones shows what a call keeps


class WatchedReward(LoadedReward):
    """Answers as a reward does, and says more: the names of arguments that the function `changed`, what it has
    `printed` on either stream, and for a request that is to be `repeated` the bytes that each call has `kept`, which is
    the least of several calls."""

    def call(self, request: dict) -> dict:
        calls: list[tuple[Mapping[str, Any], dict[str, Any]]] = []
        function = self.reward

        def watched(**arguments: object) -> object:
            calls.append((arguments, copy.deepcopy(arguments)))
            return function(**arguments)

        self.reward = watched
        with _standard_streams() as streams:
            reply = super().call(request)
            streams.seek(0)
            printed = streams.read(1000).decode(errors="replace")
        self.reward = function
        if "kind" in reply:
            return reply
        changed = [name for arguments, before in calls for name in before if arguments[name] != before[name]]
        kept = self._kept(request) if "repeated" in request else 0
        return reply | {"changed": changed, "printed": printed, "kept": kept}

    def _kept(self, request: dict) -> int:
        sizes = []
        tracemalloc.start()
        try:
            with _standard_streams():
                for _ in range(2 * CALLS + 1):
                    super().call(copy.deepcopy(request))
                    gc.collect()
                    sizes.append(tracemalloc.get_traced_memory()[0])
        finally:
            tracemalloc.stop()
        return min(after - before for before, after in pairwise(sizes[CALLS:]))


@contextmanager
def _standard_streams() -> Iterator[IO[bytes]]:
    """Gives the file that standard output and standard error go to meanwhile, also those of libraries in C."""
    with tempfile.TemporaryFile() as file:
        former = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
        try:
            for descriptor in former:
                os.dup2(file.fileno(), descriptor)
            yield file
        finally:
            for descriptor, copied in former.items():
                os.dup2(copied, descriptor)
                os.close(copied)

"""Compiled rounds on disk: a shared library for each bucket of an architecture, without weights, made once.

torch.export traces a round and AOTInductor compiles it. The result is loaded in a tenth of a second, by other runs too.
Its weights are those of the decoder that it is bound to, in place, so a publication compiles nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from policies import devices
from rollout.backends import Decoder
from rollout.compiled.graph import Bucket, Inputs, Round, weights
from rollout.compiled.recorded import RecordedRound

FOLDER = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quartet/rounds"
# Without the second one Inductor would write the numbers of SMALL weights, such as a router's bias, into the code.
OPTIONS = {"aot_inductor.package_constants_in_so": False, "always_keep_tensor_constants": True}
SMALL = 8
HERE = Path(__file__).parent
SOURCES = [
    HERE,
    HERE.parent / "sampling.py",
    HERE.parent / "drafts/speculative.py",
    HERE.parents[1] / "policies/decoding",
]


class CompiledRound:
    """A graph that is loaded. Call it with `Inputs`; it changes the caches among them."""

    def __init__(self, path: Path) -> None:
        self.loaded = torch._inductor.aoti_load_package(str(path))
        self.names = self.loaded.get_constant_fqns()
        self.bound: dict[str, Tensor] = {}  # kept alive, since the graph holds their addresses alone

    def bind(self, decoder: Decoder, bucket: Bucket) -> None:
        """Raises RuntimeError for a graph that has the numbers of a small weight in its code."""
        tensors = weights(decoder, bucket)
        if baked := {name for name, tensor in tensors.items() if tensor.numel() <= SMALL} - set(self.names):
            raise RuntimeError(f"this graph is for other weights: {min(baked)} is written into it; leave compile out")
        self.bound = {name: tensors[name] for name in self.names}
        self.loaded.load_constants(self.bound, check_full_update=True, user_managed=True)

    def release(self) -> None:
        self.bound = {}

    def __call__(self, inputs: Inputs) -> list[Tensor]:
        return self.loaded.loader.boxed_run(inputs.flat())


def find(
    decoder: Decoder, bucket: Bucket, example: Inputs, compiling: Callable[[Bucket], None]
) -> CompiledRound | RecordedRound:
    """The graph of this bucket, from disk or compiled now, which takes a minute; `compiling` is told before. On a GPU
    the round is recorded when it is first called."""
    if devices.has_cuda(example.last.device):
        return RecordedRound()
    path = FOLDER / f"{_key(decoder, bucket, example)}.pt2"
    if not path.exists():
        compiling(bucket)
        FOLDER.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
            made = Path(folder, "round.pt2")
            _compile(Round(decoder, bucket), example, made)
            made.replace(path)
    return CompiledRound(path)


def _compile(module: Round, example: Inputs, path: Path) -> None:
    with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
        warnings.simplefilter("ignore")  # of torch's own parts, to each other
        copies = tuple(tensor.clone() for tensor in example.flat())
        exported = torch.export.export(module, copies, strict=False)
        torch._inductor.aoti_compile_and_package(exported, package_path=str(path), inductor_configs=OPTIONS)


def _key(decoder: Decoder, bucket: Bucket, example: Inputs) -> str:
    """A digest of all that a graph depends on: sizes, this processor, threads, torch, and our own source."""
    tensors = {name: [*tensor.shape, str(tensor.dtype)] for name, tensor in weights(decoder, bucket).items()}
    about = {
        "bucket": vars(bucket),
        "weights": tensors,
        "inputs": [[*tensor.shape, str(tensor.dtype)] for tensor in example.flat()],
        "config": decoder.trunk.config.to_json_string(),
        "context": decoder.context,
        "torch": torch.__version__,
        "processor": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "sources": _sources(),
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]


@cache
def _sources() -> str:
    files = [file for place in SOURCES for file in sorted(place.rglob("*.py")) or [place]]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()

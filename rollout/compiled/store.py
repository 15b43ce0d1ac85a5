"""Compiled rounds on disk: a shared library for each bucket of an architecture, without weights, made once.

On a CPU one graph serves caches of any size, and any number of rows where there are no experts. torch.export traces a
round and AOTInductor compiles it. The result is loaded in a tenth of a second, by other runs too. Its weights are those
of the decoder that it is bound to, in place, so a publication compiles nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim

from policies import devices
from rollout.backends import Decoder
from rollout.compiled.graph import Bucket, Inputs, Round, weights
from rollout.compiled.recorded import RecordedRound
from rollout.cost_table import MOST_ROWS

FOLDER = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "quartet/rounds"
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
        self.bound: dict[str, Tensor] = {}  # aliases of the weights that it computes with

    def bind(self, decoder: Decoder, bucket: Bucket) -> None:
        """Raises RuntimeError for a graph that has the numbers of a small weight in its code."""
        tensors = weights(decoder, bucket)
        if baked := {name for name, tensor in tensors.items() if tensor.numel() <= SMALL} - set(self.names):
            raise RuntimeError(f"this graph is for other weights: {min(baked)} is written into it; leave compile out")
        self.release()
        self.bound = {name: tensors[name].detach() for name in self.names}
        self.loaded.load_constants(self.bound, check_full_update=True, user_managed=True)

    def release(self) -> None:
        """Let the weights go. The loaded graph never drops a tensor that it was given (pytorch #194480), so each of
        these aliases is made to hold nothing."""
        for alias in self.bound.values():
            with torch.inference_mode(alias.is_inference()):  # else oneDNN's have another type
                empty = torch.empty(0, dtype=alias.dtype)
                alias.data = empty.to_mkldnn() if alias.is_mkldnn else empty
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
    flat, sizes = _any_sizes(example, bucket)
    path = FOLDER / f"{_key(decoder, bucket, flat)}.pt2"
    if path.exists():
        with suppress(RuntimeError):  # a damaged file is made anew
            return CompiledRound(path)
    compiling(bucket)
    FOLDER.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        made = Path(folder, "round.pt2")
        _compile(Round(decoder, bucket), flat, sizes, made)
        made.replace(path)
    return CompiledRound(path)


def _any_sizes(example: Inputs, bucket: Bucket) -> tuple[list[Tensor], list[dict[int, Any]]]:
    """Tensors like those of `example` in sizes that are no other's, and which of their axes may have another size."""
    rows, entries, columns = Dim("rows", min=1, max=MOST_ROWS), Dim("entries"), Dim("columns")
    shapes = {rows: 6, entries: 160, columns: 96}  # with one row it would be a graph for one row
    flat, sizes = [], []
    for name, tensor in [*example.others.items(), *(("layer", layer) for layer in example.caches)]:
        axes = {} if name in ("stops", "columns") or bucket.rows else {0: rows}
        axes |= {0: columns} if name == "columns" else {1: entries} if name == "layer" else {}
        shape = [shapes.get(axes.get(axis), size) for axis, size in enumerate(tensor.shape)]
        flat.append(torch.zeros(shape, dtype=tensor.dtype))
        sizes.append(axes)
    return flat, sizes


def _compile(module: Round, flat: list[Tensor], sizes: list[dict[int, Any]], path: Path) -> None:
    with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
        warnings.simplefilter("ignore")  # of torch's own parts, to each other
        copies = tuple(tensor.clone() for tensor in flat)
        for name, tensor in module.named_buffers(remove_duplicate=False):
            if tensor.is_mkldnn:  # no compiler looks into oneDNN's blocks; the graph hands what it is bound to on
                setattr(module, name, torch.empty(tensor.shape, dtype=tensor.dtype))
        exported = torch.export.export(module, copies, dynamic_shapes=(tuple(sizes),), strict=False)
        torch._inductor.aoti_compile_and_package(exported, package_path=str(path), inductor_configs=OPTIONS)


def _key(decoder: Decoder, bucket: Bucket, flat: list[Tensor]) -> str:
    """A digest of all that a graph depends on: sizes, this processor, threads, torch, and our own source."""
    tensors = {name: [*t.shape, str(t.dtype), t.is_mkldnn] for name, t in weights(decoder, bucket).items()}
    about = {
        "bucket": vars(bucket),
        "weights": tensors,
        "inputs": [[*tensor.shape, str(tensor.dtype)] for tensor in flat],
        "config": decoder.trunk.config.to_json_string(),
        "context": decoder.context,
        "torch": torch.__version__,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "sources": _sources(),
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]


@cache
def _processor() -> list[str]:
    """Gives what machine code for this processor depends on. Linux names its sets of instructions, others a model."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = [f"flags: {platform.processor()}"]
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return [platform.machine(), torch.backends.cpu.get_cpu_capability(), flags]


@cache
def _sources() -> str:
    files = [file for place in SOURCES for file in sorted(place.rglob("*.py")) or [place]]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()

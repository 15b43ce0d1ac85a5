"""Mappings of tensors as safetensors files, which all processes of a run write together and any number of them reads.

policy.safetensors                  of one process
policy-00001-of-00002.safetensors   of several: every tensor is whole in one of the files, and each file is written
policy-00002-of-00002.safetensors   by another process, so that all write about the same number of bytes
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from policies.sharding import place, whole

Tensors = Mapping[str, Mapping[str, Tensor]]
DTYPES = {  # as safetensors names them
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.int64: "I64", torch.int32: "I32", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
NAME = re.compile(r"(.+?)(?:-\d{5}-of-\d{5})?")


def write(tensors: Tensors, folder: Path) -> list[Path]:
    """Write the files of this process, and return them. Every process calls it at the same time.

    Sharded tensors are gathered one after the other and are never whole all at once. Raises OSError, which names the
    file, after all were gathered: the others are not left waiting.
    """
    rank, ranks = place()
    owner = owners(tensors, ranks)
    written, refused = [], None
    for part, mapping in tensors.items():
        writers = sorted({owner[part, name] for name in mapping}) or [0]
        mine = {name: tensor for name, tensor in mapping.items() if owner[part, name] == rank}
        values = _gathered(mapping, mine)
        if rank in writers:
            number = f"-{writers.index(rank) + 1:05d}-of-{len(writers):05d}" if len(writers) > 1 else ""
            path = folder / f"{part}{number}.safetensors"
            try:
                save_file(mine, values, path)
                written.append(path)
            except OSError as error:
                refused = refused or OSError(error.errno, error.strerror, str(path))  # a write names no file
        for _ in values:
            pass
    if refused:
        raise refused
    return written


def owners(tensors: Tensors, ranks: int) -> dict[tuple[str, str], int]:
    """Decides which process writes which tensor: from the largest on, the one that has the fewest bytes so far."""
    sizes = {(part, name): _bytes(tensor) for part, mapping in tensors.items() for name, tensor in mapping.items()}
    loads, owner = [0] * ranks, {}
    for key in sorted(sizes, key=lambda key: -sizes[key]):
        owner[key] = rank = loads.index(min(loads))
        loads[rank] += sizes[key]
    return owner


def save_file(shapes: Mapping[str, Tensor], values: Iterable[Tensor], path: Path) -> None:
    """Write tensors that have the names, shapes and types of `shapes`, each when it comes, and fsync the file."""
    header, end = {}, 0
    for name, tensor in shapes.items():
        start, end = end, end + _bytes(tensor)
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for value in values:
            file.write(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def read(folder: Path, only: Collection[str] | None = None) -> dict[str, Mapping[str, Tensor]]:
    """The mappings whose files are in `folder`, or `only` these. A tensor is read when it is asked for. Raises
    FileNotFoundError if there is no such folder."""
    files = defaultdict(list)
    for path in sorted(folder.iterdir()):  # where glob would find nothing in a folder that was just removed
        part = NAME.sub(r"\1", path.stem)
        if path.suffix == ".safetensors" and (only is None or part in only):
            files[part].append(path)
    return {part: _Stored(paths) for part, paths in files.items()}


class _Stored(Mapping[str, Tensor]):
    def __init__(self, paths: Sequence[Path]) -> None:
        self._file_of = {name: file for path in paths for file in [safe_open(path, "pt")] for name in file.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> Tensor:
        return self._file_of[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def _gathered(mapping: Mapping[str, Tensor], mine: Collection[str]) -> Iterator[Tensor]:
    """The tensors of `mine`, whole. All others are gathered in between, for the processes that write them."""
    for name, tensor in mapping.items():
        value = whole(tensor.detach())
        if name in mine:
            yield value


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()

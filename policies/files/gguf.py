"""A model in one GGUF file, the format of llama.cpp: transformers reads it and makes its weights dense again."""

from __future__ import annotations

import importlib.util
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SUFFIX = ".gguf"


def file_of(source: str | Path) -> Path | None:
    """The GGUF file that `source` is, or the first one in a folder that has no config.json; None for anything else."""
    path = Path(source)
    if path.suffix == SUFFIX and path.is_file():
        return path
    return None if (path / "config.json").exists() else next(iter(_files_in(path)), None)


@contextmanager
def named(source: str | Path) -> Iterator[dict[str, Any]]:
    """The arguments that name `source`, for `from_pretrained`. A GGUF file is alone in a folder as long as that: beside
    it transformers would read another model's adapter and tokenizer too."""
    if (file := file_of(source)) is None:
        from policies.files import hub

        yield hub.arguments(source)
        return
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, file.name).symlink_to(file.resolve())
        yield {"pretrained_model_name_or_path": folder, "gguf_file": file.name}


def why_unreadable(source: str | Path) -> str:
    """Says why the GGUF file of `source` cannot be read, and the way out; empty if it can, and for anything else."""
    if (file := file_of(source)) is None:
        return ""
    if importlib.util.find_spec("gguf") is None:
        return f"{file.name} is a GGUF file, which needs the package gguf: pip install 'quartet-rl[gguf]'"
    if re.search(r"-\d{5}-of-(?!00001)\d{5}\.gguf$", file.name):
        return f"{file.name} is a part of a split GGUF file; join the parts: llama-gguf-split --merge FIRST_PART WHOLE"
    if file != Path(source) and len(files := _files_in(Path(source))) > 1:
        return f"the folder holds {len(files)} GGUF files; name one of them, such as {files[0]}"
    return ""


def _files_in(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{SUFFIX}")) if folder.is_dir() else []

"""Checksums of files: of Python code without its comments and layout."""

from __future__ import annotations

import ast
import hashlib
from pathlib import Path

BLOCK = 1 << 20  # bytes that are read at a time


def file_digest(path: Path) -> str | None:
    """SHA-256 of a file; of Python code without its comments and layout. None where there is no such file."""
    if not path.is_file():
        return None
    if path.suffix == ".py":
        return code_digest(path.read_bytes())
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def code_digest(content: bytes) -> str:
    try:
        text = ast.unparse(ast.parse(content))
    except (SyntaxError, ValueError, RecursionError):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()

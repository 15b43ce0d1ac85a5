"""Reads a run folder that a stranger may have made: plain files of a bounded size, and the text of their tokens."""

from __future__ import annotations

import json
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import zstandard
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from rewards.config.json_file import read_json
from rewards.records import read_rollouts, rollout_path

MOST_BYTES = 2**29  # of a file, and of a record when it is unpacked; as Python objects they take five times as much
TEXT_AT_MOST = 10_000_000  # characters of a completion; later tokens are numbers
OPEN_AT_MOST = 8  # tokens in the middle of a character, which has four bytes
HEADER_BYTES = 18  # the longest header of a zstandard frame


def check_files(*paths: Path) -> None:
    """Raises ValueError for a pipe, a device or a folder, and for a file that is too large. A missing file passes."""
    for path in paths:
        if not path.exists():
            continue
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path} is no plain file, so it is not read")
        _check_size(path, status.st_size, "has")


def read_step(folder: Path, step: int) -> list[dict[str, Any]]:
    """`read_rollouts` of a record that is a plain file and not too large. Raises ValueError for another one."""
    _check_record(rollout_path(folder, step))
    return read_rollouts(folder, step)


def has_prompt(folder: Path, step: int, prompt_id: str) -> bool:
    """Whether the record of a step may hold a completion of this prompt. Its lines are not parsed, which takes longer
    than to unpack them. Raises as `read_step`, and FileNotFoundError."""
    path = rollout_path(folder, step)
    _check_record(path)
    try:
        text = zstandard.ZstdDecompressor().decompress(path.read_bytes())
    except zstandard.ZstdError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return json.dumps(prompt_id).encode() in text


def _check_record(path: Path) -> None:
    check_files(path)
    if path.exists():
        with path.open("rb") as file:
            header = file.read(HEADER_BYTES)
        try:
            _check_size(path, zstandard.frame_content_size(header), "would unpack to")
        except zstandard.ZstdError as error:
            raise ValueError(f"{path} is damaged: {error}") from error


def _check_size(path: Path, size: int, verb: str) -> None:
    if size > MOST_BYTES:
        raise ValueError(f"{path} {verb} {size / 2**20:,.0f} MiB; the page reads {MOST_BYTES / 2**20:,.0f} at most")


def find_tokenizer(folder: Path) -> Tokenizer | None:
    """Returns the tokenizer of a run: None where it is damaged or missing, or where decoding could take any time or
    memory. Only what decodes is loaded: the expressions that split and normalize text may be slow ones too."""
    paths = sorted(folder.glob("**/tokenizer.json"), key=lambda path: len(path.parts))
    if not paths:
        return None
    try:
        check_files(paths[0])
        written = read_json(paths[0])
        parts = {name: written.get(name) for name in ("version", "added_tokens", "decoder", "model")}
        return Tokenizer.from_str(json.dumps(parts)) if _is_bounded(parts["decoder"]) else None
    except Exception:  # of the Rust library, which names no narrower one
        return None


def _is_bounded(decoder: Any) -> bool:
    """Returns whether no text becomes longer when it is decoded, and no regular expression is searched for.

    >>> _is_bounded({"type": "Replace", "pattern": {"String": "▁"}, "content": " "})
    True
    """
    if not isinstance(decoder, dict):
        return decoder is None
    if decoder.get("type") == "Replace":
        pattern = decoder["pattern"].get("String")
        return pattern is not None and len(decoder["content"]) <= len(pattern)
    return all(map(_is_bounded, decoder.get("decoders", [])))


def token_texts(tokenizer: Tokenizer | None, token_ids: Sequence[int]) -> list[str]:
    """A token that ends in the middle of a character adds nothing, and the one that completes it all of it. Without a
    tokenizer they are numbers."""
    if tokenizer is None:
        return [f"{token} " for token in token_ids]
    stream, texts, length, opened = DecodeStream(skip_special_tokens=False), list[str](), 0, list[int]()
    for token in token_ids:
        opened.append(token)
        try:
            text = f"<{token}>" if length > TEXT_AT_MOST else stream.step(tokenizer, token) or ""
            if not text and len(opened) == OPEN_AT_MOST:  # the stream would decode all of them again for every token
                text = tokenizer.decode(opened, skip_special_tokens=False)
                stream, opened = DecodeStream(skip_special_tokens=False), []
        except Exception:  # of the Rust library; a damaged record has such tokens
            stream, text = DecodeStream(skip_special_tokens=False), f"<{token}>"
        if text:
            opened = []
        texts.append(text)
        length += len(text)
    return texts

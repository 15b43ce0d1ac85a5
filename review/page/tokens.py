"""The text of recorded tokens, by the tokenizer that a stranger may have made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from review.readers.plain_files import check_files
from rewards.config.json_file import read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer  # of the extra `view`: overviews and events do without it

TEXT_AT_MOST = 10_000_000  # characters of a completion; later tokens are numbers
OPEN_AT_MOST = 8  # tokens in the middle of a character, which has four bytes


def find_tokenizer(folder: Path) -> Tokenizer | None:
    """Returns the tokenizer of a run: None where it is damaged or missing, or where decoding could take any time or
    memory. Only what decodes is loaded: the expressions that split and normalize text may be slow ones too."""
    from tokenizers import Tokenizer

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
    from tokenizers.decoders import DecodeStream

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

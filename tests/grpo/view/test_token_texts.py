"""Tokens as texts, where the tokenizer or the tokens were made to hurt."""

import json
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from grpo.view.reading import find_tokenizer, token_texts

CASE = Path(__file__).parents[2] / "cases/run_to_view"
GROWS = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
SEARCHES = {"type": "Replace", "pattern": {"Regex": "(a|aa)+$"}, "content": ""}


def _write(folder: Path, decoder: object) -> None:
    model = {"type": "WordLevel", "vocab": {"a": 0, "▁b": 1}, "unk_token": "a"}
    tokenizer = Tokenizer.from_str(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    written = json.loads(tokenizer.to_str()) | {"decoder": decoder}
    (folder / "tokenizer.json").write_text(json.dumps(written))


def test_bytes_that_are_no_character_take_no_time():
    tokenizer = find_tokenizer(CASE)
    half = next(i for i in range(300) if tokenizer.decode([i]) == "�")
    began = time.process_time()
    texts = token_texts(tokenizer, [half] * 20_000)
    assert time.process_time() - began < 5  # all bytes so far decoded again for every token: two minutes
    assert set(texts) == {"", "�" * 8}
    whole = Tokenizer.from_file(str(CASE / "warm_start/tokenizer.json")).encode("née 😀!").ids
    assert "".join(token_texts(tokenizer, [half] * 8 + whole)) == "�" * 8 + "née 😀!"


@pytest.mark.parametrize("decoder", [GROWS, {"type": "Sequence", "decoders": [SEARCHES]}, {"type": "Replace"}])
def test_a_decoder_that_could_take_any_time_or_memory_is_not_used(tmp_path, decoder):
    _write(tmp_path, decoder)
    assert find_tokenizer(tmp_path) is None
    assert token_texts(None, [3, 1]) == ["3 ", "1 "]


def test_a_decoder_of_sentencepiece_is_used(tmp_path):
    _write(
        tmp_path, {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}]}
    )
    assert token_texts(find_tokenizer(tmp_path), [0, 1]) == ["a", " b"]


def test_a_long_text_ends_in_numbers(monkeypatch):
    monkeypatch.setattr("grpo.view.reading.TEXT_AT_MOST", 3)
    tokenizer = find_tokenizer(CASE)
    first, *_, last = token_texts(tokenizer, [tokenizer.token_to_id("a")] * 6)
    assert (first, last[0]) == ("a", "<")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"model": {"type": "BPE"}}'])
def test_a_damaged_tokenizer_is_none(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    assert find_tokenizer(tmp_path) is None

"""The pieces of a stream are together the text of the whole."""

import random

import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from grpo.endpoint.text_stream import TextStream, bytes_of_token
from policies.presets import small_tokenizer
from rollout.stop_strings import StopStrings


@pytest.fixture(scope="module")
def tokenizer(micro_policy):
    return micro_policy(0).tokenizer


def test_the_pieces_are_the_text_also_of_bytes_that_are_no_characters(tokenizer):
    for seed in range(20):
        rng = random.Random(seed)
        ids = [rng.randrange(len(tokenizer)) for _ in range(rng.randrange(1, 60))]
        if seed % 2:
            ids = tokenizer.encode("Ünï — 日本 🎻 " * 3)[: len(ids)]
        stream, pieces, rest = TextStream(tokenizer), [], list(ids)
        while rest:
            size = rng.randrange(1, 4)
            pieces.append(stream.add(rest[:size]))
            rest = rest[size:]
        whole = tokenizer.decode(ids)
        assert "".join(pieces) + stream.finish(whole) == whole
        assert any(pieces[:-1]) or len(ids) < 4  # it does not wait for the end


def test_half_a_character_is_held_back(tokenizer):
    ids = tokenizer.encode("🎻")
    assert len(ids) > 1
    stream = TextStream(tokenizer)
    assert [stream.add([token]) for token in ids] == [""] * (len(ids) - 1) + ["🎻"]


def test_what_may_begin_a_stop_text_is_held_back(tokenizer):
    stream = TextStream(tokenizer, ["Question:", "end"])
    assert stream.add(tokenizer.encode("So 4. Que")) == "So 4. "
    assert stream.add(tokenizer.encode("st e")) == "Quest "
    assert stream.add(tokenizer.encode("n")) == ""
    whole = "So 4. Quest end"
    assert stream.finish(StopStrings(tokenizer, ["Question:", "end"]).cut(whole)) == ""


def sentencepiece_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """The letters of `texts`, and bytes for all other characters, as Llama 2 has them."""
    vocabulary = [f"<0x{byte:02X}>" for byte in range(256)] + sorted(set("".join(texts)))
    ids = {token: number for number, token in enumerate(vocabulary)}
    pieces = tokenizers.Tokenizer(tokenizers.models.BPE(ids, [], byte_fallback=True))
    pieces.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=pieces)


@pytest.mark.parametrize("make", [small_tokenizer, sentencepiece_tokenizer])
def test_the_bytes_of_tokens_are_together_those_of_the_text(make):
    """As OpenAI promises of characters that are several tokens. The fourth one is U+FFFD itself."""
    tokenizer, said = make(["a5"]), "a\u20ac\U0001f642\ufffd5"
    ids = tokenizer.encode(said, add_special_tokens=False)
    assert len(ids) > len(said)
    of_tokens = [bytes_of_token(tokenizer, token, tokenizer.decode([token])) for token in ids]
    assert b"".join(map(bytes, of_tokens)) == said.encode()


def test_bytes_that_the_vocabulary_does_not_tell_are_null():
    tokenizer = small_tokenizer(["a5"])
    assert bytes_of_token(tokenizer, tokenizer.encode("a")[0], "\ufffd") is None

"""The pieces of a stream are together the text of the whole."""

import random

import pytest

from grpo.endpoint.text_stream import TextStream
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

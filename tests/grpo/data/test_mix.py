"""The order of several sources: close to the weights in every window, and exact on resume."""

import json
from fractions import Fraction

import pytest

from grpo.data.mix import MixedStream, next_source
from grpo.data.prompts import PromptStream
from rewards.data.examples import Example

WEIGHTS = [
    {"a": 2, "b": 1},
    {"a": 1, "b": 1, "c": 1},
    {"a": 0.7, "b": 0.1, "c": 0.2},
    {"a": 1, "b": 2, "c": 3, "d": 5, "e": 50},
]


def _examples(label, count=60):
    return [Example(f"{label}/{i}", f"{label}{i} = ?", str(i)) for i in range(count)]


def _stream(weights, seed=3, count=60):
    return MixedStream({label: _examples(label, count) for label in weights}, weights, seed)


def _ids(examples):
    return [example.example_id for example in examples]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_counts_of_every_window_are_close_to_the_weights(weights):
    shares = [Fraction(str(weight)) / sum(Fraction(str(w)) for w in weights.values()) for weight in weights.values()]
    counts, prefixes = [0] * len(shares), [[0] * len(shares)]
    for number in range(1, 1001):
        counts[next_source(shares, counts)] += 1
        prefixes.append(list(counts))
        assert all(abs(count - number * share) < 1 for count, share in zip(counts, shares, strict=True))
    most = _stream(weights).most(16)
    windows = [[b - a for a, b in zip(*pair, strict=True)] for pair in zip(prefixes, prefixes[16:], strict=False)]
    assert all(count <= limit for window in windows for count, limit in zip(window, most.values(), strict=True))
    assert all(max(window[i] for window in windows) >= limit - 1 for i, limit in enumerate(most.values()))


def test_each_source_keeps_the_order_and_the_epochs_that_it_has_alone():
    stream = _stream({"a": 2, "b": 1}, count=7)
    taken = [name for _ in range(20) for name in _ids(stream.take(6))]
    mixed = "".join(name[0] for name in taken)  # whole weights are met exactly
    assert all(mixed[i : i + 3].count("a") == 2 for i in range(0, len(mixed), 3))
    for label, count in (("a", 4), ("b", 2)):
        alone = PromptStream(_examples(label, 7), 3)
        expected = [name for _ in range(20) for name in _ids(alone.take(count))]
        assert [name for name in taken if name[0] == label] == expected


@pytest.mark.parametrize("steps", [1, 4, 9])  # each source is in the middle of an epoch
def test_a_stream_goes_on_where_it_was_saved(steps):
    stream = _stream({"a": 2, "b": 1, "c": 0.3}, count=11)
    for _ in range(steps):
        stream.take(5)
    state = json.loads(json.dumps(stream.state_dict()))
    wanted = [_ids(stream.take(5)) for _ in range(12)]
    other = _stream({"a": 2, "b": 1, "c": 0.3}, count=11)
    other.take(3)
    other.load_state_dict(state)
    assert [_ids(other.take(5)) for _ in range(12)] == wanted


def test_a_changed_mix_is_refused_by_name():
    state = _stream({"a": 2, "b": 1}).state_dict()
    with pytest.raises(ValueError, match=r"data: the run began with a × 2, b × 1, and now has a × 3, b × 1"):
        _stream({"a": 3, "b": 1}).load_state_dict(state)
    with pytest.raises(ValueError, match="and now has a × 2, c × 1"):
        _stream({"a": 2, "c": 1}).load_state_dict(state)
    with pytest.raises(ValueError, match="source a: the training data have changed"):
        _stream({"a": 2, "b": 1}, count=59).load_state_dict(state)
    with pytest.raises(ValueError, match="source a: the run began with the data order of seed=3, not of seed=4"):
        _stream({"a": 2, "b": 1}, seed=4).load_state_dict(state)
    with pytest.raises(ValueError, match="the training data have changed"):
        PromptStream(_examples("a"), 3).load_state_dict(state)
    with pytest.raises(ValueError, match="the run began with one source, and now has a × 2, b × 1"):
        _stream({"a": 2, "b": 1}).load_state_dict(PromptStream(_examples("a"), 3).state_dict())

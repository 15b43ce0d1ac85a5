"""Stop strings: a completion ends with the token that completes one, its text before it, with drafts and without."""

from dataclasses import replace

import pytest

from rollout.decoding.engine import Engine
from rollout.group import Prompt
from rollout.sampling import SamplingParams
from rollout.stop_strings import StopStrings

PROMPTS = [Prompt(f"p/{i}", "", [5 + i, 9, 30 + i]) for i in range(6)]
PARAMS = SamplingParams(group_size=3, max_completion_tokens=24, seed=4, stop_token_ids=(0,))


@pytest.fixture(scope="module")
def policy(random_policy):
    return random_policy(3)


def _sample(policy, **given):
    groups = Engine(policy).sample(PROMPTS, replace(PARAMS, **given))
    return [completion for group in groups for completion in group.completions]


def _ends(policy, completion, strings) -> int | None:
    """By decoding every prefix: how many tokens it takes until a stop string is complete."""
    ids = completion.token_ids[:-1] if completion.finish_reason == "stop" else completion.token_ids
    decoded = ((n, policy.tokenizer.decode(ids[:n])) for n in range(1, len(ids) + 1))
    return next((n for n, text in decoded if any(string in text for string in strings)), None)


@pytest.fixture(scope="module")
def free(policy):
    return _sample(policy)


@pytest.fixture(scope="module")
def strings(policy, free) -> tuple[str, ...]:
    """Of two and of one character, some of them across tokens, all of which were said."""
    texts = [completion.text for completion in free]
    return texts[0][3:5], texts[4][8:10], texts[9][-1:]


def test_generation_ends_at_a_stop_string_and_the_text_before_it(policy, free, strings):
    completions, ended = _sample(policy, stop_strings=strings), 0
    for whole, completion in zip(free, completions, strict=True):
        end = _ends(policy, whole, strings)
        if end is None:
            assert (completion.token_ids, completion.text) == (whole.token_ids, whole.text)
            continue
        ended += 1
        assert completion.token_ids == whole.token_ids[:end]
        assert completion.logprobs == pytest.approx(whole.logprobs[:end], abs=1e-5)
        assert completion.finish_reason == "stop"
        text = policy.tokenizer.decode(completion.token_ids)
        assert completion.text == text[: min(text.find(s) for s in strings if s in text)]
    assert 3 <= ended < len(free)


@pytest.mark.parametrize("depth", [1, 3])
def test_contract_3_drafts_change_no_token_where_a_stop_string_ends_a_completion(policy, strings, depth):
    plain, drafted = (_sample(policy, stop_strings=strings, draft_tokens=k) for k in (0, depth))
    assert [c.token_ids for c in plain] == [c.token_ids for c in drafted]
    assert [c.text for c in plain] == [c.text for c in drafted]
    for completion in drafted:
        assert len(completion.draft.depths) == len(completion.token_ids)
        assert sum(completion.draft.accepted) <= len(completion.token_ids)


def test_the_first_of_several_and_a_string_longer_than_the_newest_tokens():
    class Letters:
        def decode(self, ids):
            return "".join(map(chr, ids))

    strings = StopStrings(Letters(), ["Question:", "\n\n"])
    ids = [ord(c) for c in "So 4.\nQuestion: and\n\nmore"]
    assert strings.end(ids, 0) == strings.end(ids, 12) == len("So 4.\nQuestion:")
    assert strings.end(ids[:14], 0) is None
    assert strings.cut("a\n\nb Question: c") == "a"
    assert strings.cut("nothing") == "nothing"

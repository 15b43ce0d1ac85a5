"""Closeness to a reference text by sacrebleu (optional extra `text`), scaled to [0, 1].

The column `reference` holds a string or a list of strings (alternatives) per row.
"""

from __future__ import annotations

from rewards.protocol import Completions, RewardError, right_at, text_of

try:
    from sacrebleu.metrics import BLEU, CHRF
except ImportError as error:
    raise RewardError("rewards bleu and chrf need sacrebleu: pip install 'quartet-rewards[text]'") from error

_BLEU = BLEU(effective_order=True)  # a sentence shorter than 4 words has no 4-grams
_CHRF = CHRF()


@right_at(None)
def bleu(prompts: list | None, completions: Completions, reference: list[str | list[str]], **_) -> list[float]:
    """Sentence BLEU (Papineni et al., 2002) with exponential smoothing and effective order.

    >>> bleu(None, ["the cat sat on the mat"], reference=["the cat sat on the mat"])
    [1.0]
    """
    return _score(_BLEU, completions, reference)


@right_at(None)
def chrf(prompts: list | None, completions: Completions, reference: list[str | list[str]], **_) -> list[float]:
    """chrF2 (Popović, 2015): F-score of character n-grams up to 6, recall counted twice."""
    return _score(_CHRF, completions, reference)


def _score(metric: BLEU | CHRF, completions: Completions, reference: list[str | list[str]]) -> list[float]:
    rewards = []
    for completion, alternatives in zip(completions, reference, strict=True):
        texts = alternatives if isinstance(alternatives, list) else [alternatives]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"reference {alternatives!r} is neither a string nor a list of strings")
        rewards.append(min(1.0, metric.sentence_score(text_of(completion), texts).score / 100))
    return rewards

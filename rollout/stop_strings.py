"""Texts that end a completion, like `until` of lm-evaluation-harness. They are for evaluation, never for training."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


class StopStrings:
    """Finds where a completion contains one of `strings`. A stop string may begin and end inside of tokens.

    >>> StopStrings(tokenizer, ["Question:"]).cut("So 4.\\nQuestion: what")
    'So 4.\\n'
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]) -> None:
        self.tokenizer, self.strings = tokenizer, strings
        # A token is at least a byte, and a character at most four. Decoding may trim the first token, hence a few more.
        self.window = 4 * max(map(len, strings)) + 8

    def end(self, ids: list[int], known: int) -> int | None:
        """The number of tokens that complete the first stop string, or None. The first `known` tokens have none."""
        if not self._contained(ids[max(0, known - self.window) :]):
            return None
        return next((n for n in range(known + 1, len(ids) + 1) if self._contained(ids[:n])), None)

    def cut(self, text: str) -> str:
        """The text before its first stop string."""
        places = [place for string in self.strings if (place := text.find(string)) >= 0]
        return text[: min(places)] if places else text

    def _contained(self, ids: list[int]) -> bool:
        text = str(self.tokenizer.decode(ids))
        return any(string in text for string in self.strings)

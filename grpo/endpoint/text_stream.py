"""The text of a completion while it grows, in pieces that together are the text of the whole."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

BROKEN = "\ufffd"  # what a tokenizer writes for bytes that are no whole character
BYTE_OF_LETTER = {letter: byte for byte, letter in bytes_to_unicode().items()}  # of byte-level tokens


def bytes_of_token(tokenizer: PreTrainedTokenizerBase, token: int, text: str) -> list[int] | None:
    """The bytes of a token whose text alone is `text`. None if nobody knows those of a part of a character.

    >>> [bytes_of_token(tokenizer, token, BROKEN) for token in tokenizer.encode("\u20ac")]
    [[226], [130], [172]]
    """
    if BROKEN not in text:
        return list(text.encode())
    written = str(tokenizer.convert_ids_to_tokens(token))
    if byte := re.fullmatch("<0x([0-9A-F]{2})>", written):  # as SentencePiece writes it
        return [int(byte[1], 16)]
    found = [BYTE_OF_LETTER[letter] for letter in written if letter in BYTE_OF_LETTER]
    return found if bytes(found).decode(errors="replace") == text else None


class TextStream:
    """Tokens come in, text goes out. It is held back while it may be half a character, or the beginning of a stop text.
    `plain_end` says up to where a text may go out, of which so many characters have gone.

    >>> stream = TextStream(tokenizer, ["Question:"])
    >>> stream.add(tokenizer.encode("So 4.\\nQue")), stream.finish("So 4.\\nQuick")
    ('So 4.\\n', 'Quick')
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_strings: Sequence[str] = (),
        plain_end: Callable[[str, int], int] | None = None,
    ) -> None:
        self.tokenizer, self.stop_strings, self.plain_end = tokenizer, stop_strings, plain_end
        self.ids: list[int] = []
        self.start = self.end = 0  # the tokens before `end` are text already; those from `start` on give its context
        self.text = ""
        self.sent = 0

    def add(self, token_ids: Sequence[int]) -> str:
        """Returns the next piece, perhaps empty, once these tokens follow."""
        self.ids += token_ids
        known = str(self.tokenizer.decode(self.ids[self.start : self.end]))
        whole = str(self.tokenizer.decode(self.ids[self.start :]))
        if not whole.endswith(BROKEN):
            self.text += whole[len(known) :]
            self.start, self.end = self.end, len(self.ids)
        end = len(self.text) - self._held()
        return self._piece(self.plain_end(self.text[:end], self.sent) if self.plain_end else end)

    def finish(self, whole: str) -> str:
        """Returns the last piece, given the text of the completion."""
        self.text = whole
        return self._piece(len(whole))

    def _held(self) -> int:
        """Returns how many characters at the end may begin a stop text."""
        most = max(map(len, self.stop_strings), default=0) - 1
        tails = range(min(most, len(self.text)), 0, -1)
        return next((n for n in tails if any(s.startswith(self.text[-n:]) for s in self.stop_strings)), 0)

    def _piece(self, until: int) -> str:
        piece = self.text[self.sent : until]
        self.sent = max(self.sent, until)
        return piece

"""The caches of texts that were decoded, for requests that go on with them: each reads only what is new."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from policies.decoding.latent_cache import LatentCache
from rollout.group import common

CACHE_TOKENS = 1 << 14  # of all conversations together, where nothing else is asked for
LEAST = 16  # tokens from a cache: fewer are not worth a forward of their own


@dataclass(frozen=True)
class Conversation:
    """The ids of a text, and the caches of its row: the trunk's, which has all but the last token, and the draft
    head's, if there is one. `read` tokens are in both."""

    token_ids: list[int]
    read: int
    trunk: Any
    head: LatentCache | None


class Conversations:
    """Keeps those that were used last, with at most `most_tokens` together. All are of the same weights."""

    def __init__(self, most_tokens: int) -> None:
        self.most_tokens = most_tokens
        self.held: list[Conversation] = []  # the one that was used last at the end

    def add(self, new: Conversation) -> None:
        """Keeps one in place of those that it goes on with."""
        ids = new.token_ids
        self.held = [old for old in self.held if ids[: len(old.token_ids)] != old.token_ids] + [new]
        while sum(len(one.token_ids) for one in self.held) > self.most_tokens:
            del self.held[0]

    def find(self, token_ids: Sequence[int]) -> tuple[Conversation, int] | None:
        """Gives the one that has most of this text, and how many tokens of it need not be read again.

        The token after these has an entry of the draft head, too, which follows from the state before it. At least two
        are left: the state after the first of them gives the draft head its next entry.
        """
        found: tuple[Conversation, int] | None = None
        for one in self.held:
            there = min(one.read, common(one.token_ids, token_ids), len(token_ids) - 1) - 1
            if there >= (LEAST if found is None else found[1] + 1):
                found = one, there
        if found is not None:
            self.held.remove(found[0])
            self.held.append(found[0])
        return found

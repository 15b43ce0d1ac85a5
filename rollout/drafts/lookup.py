"""Drafts that are looked up: what followed the same tokens in what was written after this prompt before.

Two sources are looked up: the group's siblings in the same shard, and completions of the same prompt from earlier
steps. The last tokens of a row are searched for, the longest of ORDERS first, and all that followed them is counted. A
draft is chosen from the counts with the noise that the trunk's own choice will use, and further drafts follow the same
way. The depth is chosen before, from which rows find something, so it does not depend on the noise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import Tensor

from rollout.depth import Kind
from rollout.group import Prompt
from rollout.sampling import CountedChoice, SamplingParams, row_key

ORDERS = (8, 4, 3, 2)  # how many of the last tokens are looked up


class Continuations:
    """What followed each run of tokens in some texts.

    >>> seen = Continuations()
    >>> seen.add([5, 6, 7, 5, 6, 8], start=0, end=6)
    >>> seen.after([9, 5, 6])
    (2, [7, 8])
    """

    def __init__(self) -> None:
        # Most runs occur once. A list for each would keep Python's garbage collector busy, five times as long as this.
        self._next: dict[tuple[int, ...], int | list[int]] = {}

    def add(self, text: Sequence[int], start: int, end: int) -> None:
        """Counts the tokens from `start` to before `end`; those before are only what they followed."""
        for at in range(start, end):
            for order in ORDERS:
                if order <= at:
                    run = tuple(text[at - order : at])
                    before = self._next.get(run)
                    if isinstance(before, list):
                        before.append(text[at])
                    else:
                        self._next[run] = text[at] if before is None else [before, text[at]]

    def after(self, tokens: Sequence[int]) -> tuple[int, list[int]] | None:
        """The length of the longest run that was found, and the tokens that followed it."""
        for order in ORDERS:
            if order <= len(tokens) and (found := self._next.get(tuple(tokens[-order:]))) is not None:
                return order, found if isinstance(found, list) else [found]
        return None


class Lookup:
    """The texts of a shard's rows, by their index, and where drafts of each are looked up.

    Prompts with the same id share their texts: with `rollout.partial` the rows of a group are prompts of their own.
    Rounds are read and texts are counted when they are first looked in: with many rows drafts do not pay, and both
    would only cost.
    """

    def __init__(self, prompts: Sequence[Prompt], params: SamplingParams, vocabulary: int) -> None:
        self.prompts, self.params = prompts, params
        self.choose = CountedChoice(params.temperature, vocabulary)
        self.sources = [source for source in params.draft_sources if source != "head"]
        self.seen: dict[tuple[str, str], Continuations] = {}
        self.uncounted: dict[tuple[str, str], list[tuple[Sequence[int], int, int]]] = {}  # texts with start and end
        self.held: list[tuple[Tensor, Tensor, Tensor]] = []
        self.missed = 0  # tokens of texts and rounds since it was last set to 0, without those of the last round
        self.texts: dict[int, list[int]] = {}  # the end of the prompt, and the completion so far
        self.keys: dict[int, tuple[int, int]] = {}

    def begin(self, number: int) -> None:
        """The rows of this prompt are decoded from now on."""
        prompt, group = self.prompts[number], self.params.group_size
        if "siblings" in self.sources:
            self._wrote("siblings", prompt, prompt.token_ids, start=0)
            self.missed += len(prompt.token_ids)
        if "history" in self.sources and ("history", prompt.prompt_id) not in self.seen | self.uncounted:
            for text in prompt.history:
                self._wrote("history", prompt, prompt.token_ids[-ORDERS[0] :] + text, start=self._tail(prompt))
                self.missed += len(text)
        for sample in range(group):
            row = number * group + sample
            self.texts[row] = prompt.token_ids[-ORDERS[0] :]
            self.keys[row] = row_key(self.params, prompt.prompt_id, prompt.first_sample + sample)

    def hold(self, rows_R: Tensor, tokens_RS: Tensor, kept_R: Tensor) -> None:
        """`keep`, once something is looked in."""
        if self.held:
            self.missed += self.held[-1][1].numel()
        self.held.append((rows_R, tokens_RS, kept_R))

    def keep(self, rows: Sequence[int], tokens: Sequence[Sequence[int]], kept: Sequence[int]) -> None:
        """The first `kept` of these tokens are the next ones of the rows."""
        for row, new, count in zip(rows, tokens, kept, strict=True):
            if count:
                text = self.texts[row]
                text.extend(new[:count])
                if "siblings" in self.sources:
                    self._wrote("siblings", self._prompt(row), text, start=len(text) - count)

    def _keep_held(self) -> None:
        held, self.held = self.held, []
        for part in held:
            self.keep(*(x.tolist() for x in part))

    def kinds(self, row: int) -> list[Kind]:
        """The sources that have a draft for the row's next token, each with how many of the last tokens it knows."""
        self._keep_held()
        prompt, text = self._prompt(row), self.texts[row]
        found = ((source, self._seen(source, prompt).after(text)) for source in self.sources)
        return [(source, after[0]) for source, after in found if after]

    def draft(self, row: int, source: str, depth: int) -> list[int]:
        """Up to `depth` drafts of this source."""
        prompt, text = self._prompt(row), self.texts[row]
        seen, recent = self._seen(source, prompt), text[-ORDERS[0] :]
        position = self.params.start + len(text) - self._tail(prompt)
        drafts: list[int] = []
        while len(drafts) < depth and (after := seen.after(recent)):
            drafts.append(self.choose(self.keys[row], position + len(drafts), Counter(after[1])))
            recent = [*recent[1 - ORDERS[0] :], drafts[-1]]
        return drafts

    def _prompt(self, row: int) -> Prompt:
        return self.prompts[row // self.params.group_size]

    def _tail(self, prompt: Prompt) -> int:
        return min(ORDERS[0], len(prompt.token_ids))

    def _wrote(self, source: str, prompt: Prompt, text: Sequence[int], start: int) -> None:
        self.uncounted.setdefault((source, prompt.prompt_id), []).append((text, start, len(text)))

    def _seen(self, source: str, prompt: Prompt) -> Continuations:
        key = source, prompt.prompt_id
        seen = self.seen.setdefault(key, Continuations())
        for written in self.uncounted.pop(key, ()):
            seen.add(*written)
        return seen

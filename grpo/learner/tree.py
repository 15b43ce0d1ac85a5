"""What rows begin with alike is read once: a tree, whose branches are the ways in which they go on (contract 10).

    system ┬ question 1 ┬ c1                        a group is a tree of its prompt and its completions
           │            └ c2 ─ a tool's result ┬ c3     segments and forks of an episode
           │                                   └ c4
           └ question 2 ─ c5                        groups with one system prompt

A token attends to the branches on the way to it and to its own. A tree has no place where one sample would leave it in
the middle of what it has sampled in one turn: there a draft may not end (contract 7).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from grpo.learner.row import PackedRow, Sample

SHARED = 128  # tokens, a tile of flex attention: to share fewer spares little, and rows are as long as they were
FEWEST = 2  # tokens of a branch that others go on from: recurrent layers take a single one for a step of decoding
TOOL, READ, BEGINS, GOES_ON = -1, 0, 1, 2  # marks of tokens; the last two are of a turn that was sampled


@dataclass(eq=False)
class Branch:
    """Tokens that all samples after it have read. `marks` say of each what it is to the samples that go through."""

    token_ids: list[int]
    marks: list[int]
    before: Branch | None = None
    after: list[Branch] = field(default_factory=list)
    start: int = 0  # its place in the row, and how many tokens come before it on the way; see `Tree.laid`
    depth: int = 0
    until: int = 0  # the number of the last branch that goes on from it

    @property
    def stop(self) -> int:
        return self.start + len(self.token_ids)

    @property
    def preceding(self) -> int:
        """The place of the token before its first one; the first of all has none, and gets its own."""
        return 0 if self.before is None else max(self.before.stop - 1, 0)

    def shared(self, token_ids: Sequence[int], marks: Sequence[int]) -> int:
        """Counts the tokens of this branch with which these begin, up to the last place where they may leave it."""
        length = 0
        for own, other, mark, other_mark in zip(self.token_ids, token_ids, self.marks, marks, strict=False):
            if own != other or (mark != other_mark and mark > READ < other_mark):  # of turns that begin elsewhere
                break
            length += 1
        while length and not self._may_be_left(length, marks[length : length + 1]):
            length -= 1
        return length

    def _may_be_left(self, length: int, ahead: Sequence[int]) -> bool:
        """Tells whether this branch may end after so many tokens, where these marks come next."""
        left = len(self.token_ids) - length
        long_enough = length >= FEWEST and (left >= FEWEST or not left or not self.after)
        return long_enough and GOES_ON not in (*self.marks[length : length + 1], *ahead)

    def split(self, length: int) -> Branch:
        """Makes a branch of the first tokens, after which the rest comes."""
        first = Branch(self.token_ids[:length], self.marks[:length], self.before, [self])
        assert self.before is not None
        siblings = self.before.after
        siblings[siblings.index(self)] = first
        self.token_ids, self.marks, self.before = self.token_ids[length:], self.marks[length:], first
        return first

    def places(self) -> Tensor:
        """Tells where all stands that was read up to its end."""
        branch, parts = self, []
        while branch.before is not None:
            parts.append(torch.arange(branch.start, branch.stop))
            branch = branch.before
        return torch.cat(parts[::-1])


Place = tuple[int, Branch, int]  # after how many tokens of what is read, in which branch, after how many tokens of it


class Tree:
    """Rows of a micro-batch that stand in one of its rows. `ends` are the branches at which the prompt of each row ends
    and, after it, each of its samples.

    >>> first, second = PackedRow([7, 8], [Sample(0, [1]), Sample(1, [3])]), PackedRow([7, 8, 9], [Sample(2, [4])])
    >>> Tree([first, second]).length                                            # 7 8 1 3 9 4
    6
    """

    def __init__(self, rows: Sequence[PackedRow]) -> None:
        self.rows: list[PackedRow] = []
        self.root = Branch([], [])
        self.ends: list[tuple[Branch, list[Branch]]] = []
        self.length = 0
        for row in rows:
            self.add(row)

    @property
    def learns(self) -> bool:
        return self.rows[0].learns

    def laid(self) -> list[Branch]:
        """All branches in the order in which they stand in the row, each before those that go on from it."""
        order: list[Branch] = []
        ahead, start = self.root.after[::-1], 0
        while ahead:
            branch = ahead.pop()
            assert branch.before is not None
            branch.start, branch.depth = start, branch.before.depth + len(branch.before.token_ids)
            branch.until, start = len(order), branch.stop
            order.append(branch)
            ahead += branch.after[::-1]
        for branch in reversed(order):
            branch.until = max([branch.until, *(one.until for one in branch.after)])
        return order

    def places(self) -> list[tuple[Tensor, list[Tensor]]]:
        """Tells for each row where its prompt stands, and where the tokens of each of its samples do."""
        found = []
        for prompt, samples in self.ends:
            of_prompt = prompt.places()
            found.append((of_prompt, [sample.places()[len(of_prompt) :] for sample in samples]))
        return found

    def shared(self, row: PackedRow) -> int:
        """Counts the tokens of its prompt that are here already."""
        return self._of_prompt(row.prompt_token_ids)[0]

    def add(self, row: PackedRow) -> None:
        ids, samples = row.prompt_token_ids, []
        prompt = self._grow(self.root, ids, [READ] * len(ids), self._of_prompt(ids))
        for sample in row.samples:
            marks = marks_of(sample)
            place = self._last(prompt, sample.token_ids, marks)
            if place[0] < min(SHARED, len(sample.token_ids)):  # what was sampled twice is read once
                place = 0, prompt, len(prompt.token_ids)
            samples.append(self._grow(prompt, sample.token_ids, marks, place))
        self.ends.append((prompt, samples))
        self.rows.append(row)

    def _of_prompt(self, ids: Sequence[int]) -> Place:
        """Finds where a prompt leaves the tree, for a branch that is long enough to go on from."""
        place = self._last(self.root, ids, [READ] * len(ids))
        return place if len(ids) - place[0] != 1 else self._last(self.root, ids[:-FEWEST], [READ] * len(ids))

    def _last(self, branch: Branch, ids: Sequence[int], marks: Sequence[int]) -> Place:
        """Finds where these leave the tree that they enter after `branch`."""
        depth, inside = 0, len(branch.token_ids)
        while inside == len(branch.token_ids):
            ahead = [(one.shared(ids[depth:], marks[depth:]), one) for one in branch.after]
            length, best = max(ahead, key=lambda pair: pair[0], default=(0, branch))
            if not length:
                break
            depth, branch, inside = depth + length, best, length
        return depth, branch, inside

    def _grow(self, start: Branch, ids: Sequence[int], marks: Sequence[int], place: Place) -> Branch:
        """Adds what comes after `start` and leaves the tree at this place. Returns the branch at which it ends."""
        depth, branch, inside = place
        if inside < len(branch.token_ids):
            branch = branch.split(inside)
        through, end = branch, depth
        while through is not start:
            assert through.before is not None
            begin = end - len(through.token_ids)
            through.marks = list(map(max, through.marks, marks[begin:end]))
            through, end = through.before, begin
        if depth < len(ids):
            branch.after.append(Branch(list(ids[depth:]), list(marks[depth:]), branch))
            self.length += len(ids) - depth
            branch = branch.after[-1]
        return branch


def marks_of(sample: Sample) -> list[int]:
    """Marks the tokens of a sample.

    >>> marks_of(Sample(0, [4, 5, 6, 7], sampled=[True, True, False, True]))
    [1, 2, -1, 1]
    """
    sampled = sample.sampled or [True] * len(sample.token_ids)
    before = [False, *sampled]
    return [(GOES_ON if former else BEGINS) if own else TOOL for own, former in zip(sampled, before, strict=False)]


def forest(rows: Sequence[PackedRow], max_tokens: int, *, within_groups: bool = False) -> list[Tree]:
    """Puts rows whose prompts begin alike into few trees of at most `max_tokens`, and each other row alone."""
    trees: list[Tree] = []
    alike: dict[tuple[object, ...], list[Tree]] = defaultdict(list)
    for row in rows:
        begin = row.prompt_token_ids[:SHARED]
        known = alike[row.learns, within_groups and row.group, *begin] if len(begin) == SHARED else []
        shared = [(tree.shared(row), tree) for tree in known]
        fitting = [(tokens, tree) for tokens, tree in shared if 0 < tokens >= tree.length + row.length - max_tokens]
        if fitting:
            max(fitting, key=lambda pair: pair[0])[1].add(row)
        else:
            trees.append(Tree([row]))
            known.append(trees[-1])
    return trees

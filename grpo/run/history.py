"""What prompts got in earlier steps, from the records of the run: a source of drafts (`rollout.draft_sources`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from grpo.run.records import read_rollouts
from rollout.group import Prompt


class History:
    """Remembers in which steps each prompt was sampled, and reads its completions in the last of them again.

    A batch that is sampled `ahead` knows the steps up to the one whose weights it has: their records are complete by
    then, whatever the timing (contract 12). The state is `steps`, and the rest is in the run's folder. Where a record
    is not there or damaged, `on_missing` gets its step and the reason, and its prompts have no history.

    >>> history = History(Path("runs/demo"), ahead=0)
    >>> history.sampled(1, ["word_problems/train/0"])
    >>> history.of([prompt], step=2)[0].history     # prompt.prompt_id == "word_problems/train/0"
    [[17, 4, 2], [17, 9, 2], ...]
    """

    def __init__(
        self, folder: Path, ahead: int, on_missing: Callable[[int, str], None] = lambda step, why: None
    ) -> None:
        self.folder, self.ahead, self.on_missing = folder, ahead, on_missing
        self.steps: dict[str, list[int]] = {}  # ascending; replaced and never changed, so that it can be put back
        self._missing: set[int] = set()

    def sampled(self, step: int, prompt_ids: Iterable[str]) -> None:
        """The record of this step has completions of these prompts, or will have them."""
        kept = self.ahead + 1  # steps that a batch may not know yet, and the last that it knows
        added = {i: [*self.steps.get(i, []), step][-kept:] for i in dict.fromkeys(prompt_ids)}
        self.steps = {**self.steps, **added}

    def of(self, prompts: Sequence[Prompt], step: int) -> list[Prompt]:
        """The prompts with the completions of the last step that the batch of `step` knows."""
        known = step - 1 - self.ahead
        last = [max((s for s in self.steps.get(p.prompt_id, []) if s <= known), default=None) for p in prompts]
        found: dict[tuple[int, str], list[list[int]]] = {}
        for earlier in sorted({s for s in last if s is not None}):
            wanted = {prompt.prompt_id for prompt, s in zip(prompts, last, strict=True) if s == earlier}
            for line in self._read(earlier):
                if line["prompt_id"] in wanted:
                    found.setdefault((earlier, line["prompt_id"]), []).append(line["token_ids"])
        return [
            replace(prompt, history=[] if s is None else found.get((s, prompt.prompt_id), []))
            for prompt, s in zip(prompts, last, strict=True)
        ]

    def _read(self, step: int) -> list[dict]:
        try:
            return read_rollouts(self.folder, step)
        except (OSError, ValueError) as error:
            if step not in self._missing:
                self._missing.add(step)
                self.on_missing(step, str(error))
            return []

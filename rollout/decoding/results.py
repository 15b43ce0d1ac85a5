"""What a shard has sampled so far, for every completion, and the groups made of it at the end."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rollout.group import Completion, DraftStats, FinishReason, Prompt, RolloutGroup
from rollout.rows import Drafted, Rows
from rollout.stop_strings import StopStrings


class Results:
    """N completions of P prompts, [N] first everywhere, in the order of `Rows.index`: prompt · G + sample.

    `room`: the most tokens that a completion may be given; `depth`: the most drafts of one forward.
    """

    def __init__(self, completions: int, room: int, depth: int, device: torch.device) -> None:
        whole = {"dtype": torch.long, "device": device}
        self.token_ids = torch.zeros(completions, room, **whole)
        self.logprobs = torch.zeros(completions, room, device=device)
        self.depths = torch.zeros(completions, room, dtype=torch.uint8, device=device)
        self.counts = torch.zeros(completions, **whole)
        # `cut`: stopped by a string, and not by a token
        flags = (torch.zeros(completions, dtype=torch.bool, device=device) for _ in range(3))
        self.stopped, self.aborted, self.cut = flags
        self.forwards, self.fallbacks = torch.zeros(completions, **whole), torch.zeros(completions, **whole)
        self.drafted, self.accepted = (torch.zeros(completions, depth, **whole) for _ in range(2))
        self.routing: Tensor | None = None  # [N, room, routers, k], made when the first prompts are read
        self.prompt_routing: dict[int, Tensor] = {}
        self.steps = torch.arange(room, device=device)

    def __len__(self) -> int:
        return len(self.counts)

    # The `add` functions are called before `live.count` counts the new tokens.

    def add(
        self, live: Rows, ids_RS: Tensor, logprobs_RS: Tensor, kept_R: Tensor, stopped_R: Tensor, cut_R: Tensor | None
    ) -> Tensor:
        """Add the first `kept_R` of these tokens to the rows. Returns how many each has then."""
        at = self._places(live, live.count, ids_RS.shape[1])
        self.token_ids[at], self.logprobs[at] = ids_RS, logprobs_RS
        self.counts[live.index] = count_R = live.count + kept_R
        self.stopped[live.index] |= stopped_R
        if cut_R is not None:
            self.cut[live.index] |= cut_R & stopped_R
        return count_R

    def add_drafts(self, live: Rows, drafts: Drafted, accepted_R: Tensor, kept_R: Tensor) -> None:
        depth = drafts.depth
        steps, alive = self.steps[:depth], live.alive[:, None]
        right = (steps < torch.minimum(accepted_R, kept_R)[:, None]) & alive
        self.accepted[live.index, :depth] += right
        self.depths[self._places(live, live.count, depth)] = ((steps + 1) * right).to(torch.uint8)
        if drafts.confident_RK is not None:
            self.fallbacks[live.index] += live.alive & (accepted_R < depth)

    def add_forward(self, live: Rows, drafts: Drafted | None) -> None:
        self.forwards[live.index] += live.alive
        if drafts:
            self.drafted[live.index, : drafts.depth] += live.alive[:, None]

    def add_routing(self, live: Rows, experts: Tensor, new: int) -> None:
        """Adds the experts and attention heads [R · S, routers, k] of each row's last token and the drafts after it."""
        assert self.routing is not None  # since the prefill
        experts = experts.view(-1, new, *experts.shape[1:])
        self.routing[self._places(live, live.count - 1, new)] = experts.to(torch.int16)

    def add_prompt_routing(self, numbers: Sequence[int], experts: Tensor, lengths_P: Tensor, longest: int) -> None:
        """Add the experts and attention heads [P · longest, routers, k] of the prompts with these numbers."""
        experts = experts.view(len(numbers), longest, *experts.shape[1:])
        if self.routing is None:
            shape = *self.token_ids.shape, *experts.shape[2:]
            self.routing = torch.full(shape, -1, dtype=torch.int16, device=experts.device)
        for i, row, length in zip(numbers, experts, lengths_P.tolist(), strict=True):
            self.prompt_routing[i] = row[:length].to(torch.int16).cpu()

    def of(self, rows: Sequence[int]) -> Results:
        """A copy with these completions alone."""
        some = copy.copy(self)
        for name, value in self._by_completion().items():
            vars(some)[name] = value[list(rows)]
        return some

    def clear(self, rows: Sequence[int]) -> None:
        """Make the places of these completions free for other ones."""
        for value in self._by_completion().values():
            value[list(rows)] = 0

    def _by_completion(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor) and name != "steps"}

    def groups(
        self,
        prompts: Sequence[Prompt],
        tokenizer: PreTrainedTokenizerBase,
        strings: StopStrings | None,
        version: int,
        temperature: float,
    ) -> list[RolloutGroup]:
        """The groups of all prompts; `version` is that of the policy, `temperature` what they were sampled with."""
        of_drafts = (self.forwards, self.drafted, self.accepted, self.fallbacks)
        stats = zip(*(x.tolist() for x in of_drafts), strict=True)
        of_tokens = (self.counts, self.token_ids, self.logprobs, self.depths, self.stopped, self.aborted, self.cut)
        rows = enumerate(zip(*(x.tolist() for x in of_tokens), strict=True))
        routing = None
        if self.routing is not None:
            routing = self.routing.cpu()
            # The last token is never read for a next one: at its place are the experts of some draft, or none.
            routing[torch.arange(len(routing)), self.counts.cpu() - 1] = -1
        completions = []
        for row, (count, token_ids, logprobs, depths, stopped, aborted, cut) in rows:
            ids, (forwards, drafted, accepted, fallbacks) = token_ids[:count], next(stats)
            text = str(tokenizer.decode(ids[:-1] if stopped and not cut else ids))
            reason: FinishReason = "abort" if aborted else "stop" if stopped else "length"
            completions.append(
                Completion(
                    token_ids=ids,
                    logprobs=logprobs[:count],
                    text=strings.cut(text) if strings else text,
                    finish_reason=reason,
                    policy_version=version,
                    draft=DraftStats(forwards, drafted, accepted, fallbacks, depths[:count]),
                    routing=None if routing is None else routing[row, :count],
                    temperature=temperature,
                )
            )
        size = len(completions) // max(len(prompts), 1)
        return [
            RolloutGroup(prompt, completions[i * size : (i + 1) * size], self.prompt_routing.get(i))
            for i, prompt in enumerate(prompts)
        ]

    def _places(self, live: Rows, start_R: Tensor, new: int) -> tuple[Tensor, Tensor]:
        """Gives the places of `new` tokens of each row, from `start_R` on. The last place is never kept: it takes what
        is past it, such as the padding after a short text of a tool."""
        return live.index[:, None], (start_R[:, None] + self.steps[:new]).clamp(max=len(self.steps) - 1)

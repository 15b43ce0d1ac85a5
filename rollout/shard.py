"""One shard being decoded: prefill each prompt once, then draft, verify and keep, until every row has ended.

Rows are ragged: each has its own length, also in the middle of a drafted block. Finished rows leave, and prompts that
waited take their places.

Axes: P prompts, G completions each, R live rows, S = k + 1 tokens of a verifying forward, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rollout.depth import DepthController
from rollout.drafts.head import Drafter, Prefilled
from rollout.group import Completion, DraftStats, FinishReason, Prompt, RolloutGroup
from rollout.sampling import Noise, SamplingParams, choose, logprobs_of, row_key
from rollout.speculative import verify_draft
from rollout.stop_strings import StopStrings

if TYPE_CHECKING:
    from rollout.engine import Engine

# Padded tokens of one prefill; prompts of like length go together. On a CPU more of them leave its caches.
PREFILL_TOKENS, CPU_PREFILL_TOKENS = 16384, 1024


@dataclass
class Rows:
    """State of the live rows, [R] first everywhere. A row stays for a while after its end.

    The head takes a token in when it drafts behind it. Until then the token lies in `unread_tokens`, and the hidden
    state that precedes it in `unread_hidden`: many of them where nothing was drafted for long.
    """

    index: Tensor  # prompt · G + sample: the row's place in the results
    keys_R2: Tensor  # of its noise
    prompt_length: Tensor
    last: Tensor  # its newest token, which the trunk has not read yet
    count: Tensor  # tokens of its completion so far, `last` included
    alive: Tensor  # False once it has ended
    unread: Tensor  # how many tokens the head has not taken in
    unread_tokens: Tensor
    unread_hidden: Tensor

    def select(self, kept: Tensor) -> Rows:
        return Rows(**{name: value[kept] for name, value in vars(self).items()})

    @staticmethod
    def concat(parts: Sequence[Rows]) -> Rows:
        return Rows(**{name: torch.cat([vars(part)[name] for part in parts]) for name in vars(parts[0])})


class Decoding:
    """The state of `Engine.sample`: call `forward` until `done`, then take the `groups`."""

    def __init__(self, engine: Engine, prompts: Sequence[Prompt], params: SamplingParams) -> None:
        self.engine, self.prompts, self.params = engine, prompts, params
        self.trunk: Any = engine.trunk
        self.prefill_tokens = CPU_PREFILL_TOKENS if engine.trunk.device.type == "cpu" else PREFILL_TOKENS
        self.device, self.vocabulary = engine.trunk.device, len(engine.trunk.embedding)
        self.fixed_depth, self.controller = params.draft_tokens, None
        if self.fixed_depth is None and engine.costs is not None and engine.head is not None:
            self.controller = DepthController(engine.costs, engine.costs.max_depth)
        self.max_depth = self.controller.max_depth if self.controller else self.fixed_depth or 0
        total, limit = len(prompts) * params.group_size, params.max_completion_tokens
        self.room = limit + self.max_depth + 1  # a forward writes S tokens behind a row's end; what it keeps is counted
        self.steps = torch.arange(self.room, device=self.device)
        self.strings = StopStrings(engine.policy.tokenizer, params.stop_strings) if params.stop_strings else None
        self.stops = torch.tensor(params.stop_token_ids, dtype=torch.long, device=self.device)
        whole = {"dtype": torch.long, "device": self.device}
        self.token_ids = torch.zeros(total, self.room, **whole)
        self.logprobs = torch.zeros(total, self.room, device=self.device)
        self.depths = torch.zeros(total, self.room, dtype=torch.uint8, device=self.device)
        self.counts = torch.zeros(total, **whole)
        # `cut`: stopped by a string, and not by a token
        flags = (torch.zeros(total, dtype=torch.bool, device=self.device) for _ in range(3))
        self.stopped, self.aborted, self.cut = flags
        self.forwards, self.fallbacks = torch.zeros(total, **whole), torch.zeros(total, **whole)
        self.drafted, self.accepted = (torch.zeros(total, self.max_depth, **whole) for _ in range(2))
        self.routing: Tensor | None = None
        self.prompt_routing: dict[int, Tensor] = {}
        # The longest first, so that the prompts of one prefill need little padding. Taken from the end.
        self.waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i].token_ids))
        self.longest = max((len(prompt.token_ids) for prompt in prompts), default=0)
        self.live: Rows | None = None
        self.cache: Any = None
        self.drafter: Drafter | None = None
        if self.max_depth:
            assert engine.head is not None
            sizes = {"room": self.room, "longest": self.longest, "context": engine.policy.max_length}
            self.drafter = Drafter(engine.head, engine.draft_vocabulary, params, **sizes)
        self.admitted = self.ended_rows = self.alive = 0
        self._refill()

    @property
    def done(self) -> bool:
        return self.ended_rows == len(self.token_ids)

    # ---- rows come and go ---------------------------------------------------------------------------------------

    def _refill(self) -> None:
        """Admit waiting prompts where at least a quarter of the rows are free."""
        group, most = self.params.group_size, self.engine.max_rows
        while self.waiting and (not self.alive or most - self.alive >= max(group, most // 4)):
            self._admit(max(1, (most - self.alive) // group))

    def _admit(self, places: int) -> None:
        """Prefill up to `places` prompts and put their rows behind those that live."""
        rows, caches = ([self.live], [self.cache]) if self.alive and self.live is not None else ([], [])
        if self.drafter and not rows:
            self.drafter.forget()
        while self.waiting and places > 0:
            longest = len(self.prompts[self.waiting[-1]].token_ids)
            size = min(places, len(self.waiting), max(1, self.prefill_tokens // longest))
            places -= size
            new, cache = self._prefill([self.waiting.pop() for _ in range(size)])
            rows.append(new)
            caches.append(cache)
        self.live, self.cache = Rows.concat(rows), _join(caches)
        self._retire()

    def _prefill(self, chunk: Sequence[int]) -> tuple[Rows, Any]:
        """Every prompt once; its latents become the prefix that its rows share, its last hidden state their start."""
        group, trunk = self.params.group_size, self.trunk
        prompts = [self.prompts[i] for i in chunk]
        lengths = torch.tensor([len(p.token_ids) for p in prompts], device=self.device)
        longest = int(lengths.max())
        token_ids = torch.tensor(
            [p.token_ids + [0] * (longest - len(p.token_ids)) for p in prompts], device=self.device
        )
        cache = trunk.cache(len(chunk), longest)
        hidden = trunk(token_ids, torch.arange(longest, device=self.device).expand_as(token_ids), cache)
        if self.params.record_routing:
            routing = trunk.routing().view(*token_ids.shape, *trunk.routing().shape[1:])
            if self.routing is None:
                shape = len(self.token_ids), self.room, *routing.shape[2:]
                self.routing = torch.full(shape, -1, dtype=torch.int16, device=self.device)
            for i, row, length in zip(chunk, routing, lengths.tolist(), strict=True):
                self.prompt_routing[i] = row[:length].to(torch.int16).cpu()
        cache.advance(lengths)
        cache = cache.fan_out(group, self.room, self.longest)
        if self.drafter:
            self.drafter.hold(Prefilled(torch.tensor(chunk, device=self.device), token_ids, hidden, lengths))
        self.admitted += len(chunk) * group
        last = hidden[torch.arange(len(chunk), device=self.device), lengths - 1]
        keys = [row_key(self.params, p.prompt_id, sample) for p in prompts for sample in range(group)]
        total, unread = len(keys), self.room if self.max_depth else 0
        empty = torch.zeros(total, dtype=torch.long, device=self.device)
        index = torch.tensor([i * group + sample for i in chunk for sample in range(group)], device=self.device)
        rows = Rows(
            index=index,
            keys_R2=torch.tensor(keys, dtype=torch.int32, device=self.device),
            prompt_length=lengths.repeat_interleave(group),
            last=empty,
            count=empty,
            alive=torch.ones(total, dtype=torch.bool, device=self.device),
            unread=empty,
            unread_tokens=torch.zeros(total, unread, dtype=torch.long, device=self.device),
            unread_hidden=hidden.new_zeros(total, unread, hidden.shape[-1]),
        )
        logits = trunk.logits(last).repeat_interleave(group, dim=0)[:, None]
        noise = self._noise(rows, 1)
        self._settle(rows, logits, last.repeat_interleave(group, dim=0)[:, None], None, None, noise)
        return rows, cache

    def _retire(self) -> None:
        """Count the rows that ended. They leave when they are an eighth of the batch: moving the caches at every
        single end would cost more."""
        live = self.live
        assert live is not None
        live.alive = live.alive & ~self.stopped[live.index] & (live.count < self.params.max_completion_tokens)
        kept = live.alive.nonzero()[:, 0]
        self.alive = len(kept)
        self.ended_rows = self.admitted - self.alive
        if 0 < self.alive <= len(live.alive) * 7 // 8:
            self.live = live.select(kept)
            self.cache.select(kept)
            if self.drafter:
                self.drafter.select(kept)

    # ---- one round ----------------------------------------------------------------------------------------------

    def forward(self) -> None:
        """Draft k tokens a row, verify them in one forward of the trunk, and fill the places of rows that ended."""
        live = self.live
        assert live is not None
        depth = self._depth(live)
        noise = self._noise(live, depth + 1)
        drafts, confident = self.drafter.draft(live, depth, noise) if self.drafter and depth else (None, None)
        inputs = live.last[:, None] if drafts is None else torch.cat([live.last[:, None], drafts], dim=1)
        positions = (live.prompt_length + live.count - 1)[:, None] + self.steps[: depth + 1]
        positions = positions.clamp(max=self.engine.policy.max_length - 1)  # nothing behind the context is kept
        hidden = self.trunk(inputs, positions, self.cache)
        if self.params.record_routing:
            self._note_routing(live, depth + 1)
        self.forwards[live.index] += live.alive
        if depth:
            self.drafted[live.index, :depth] += live.alive[:, None]
        self.cache.advance(self._settle(live, self.trunk.logits(hidden), hidden, drafts, confident, noise))
        self._retire()
        self._refill()

    def _depth(self, live: Rows) -> int:
        """How deep to draft now; never deeper than the longest row can still use."""
        if not self.max_depth:
            return 0
        count = live.count if self.alive == len(live.count) else live.count[live.alive]
        most = self.params.max_completion_tokens - int(count.min()) - 1
        return self.controller.pick(self.alive, most) if self.controller else min(self.max_depth, most)

    def _noise(self, rows: Rows, places: int) -> Noise:
        return Noise(rows.keys_R2[:, None], rows.count[:, None] + self.steps[:places], self.vocabulary)

    def _settle(
        self,
        live: Rows,
        logits_RSV: Tensor,
        hidden_RSD: Tensor,
        drafts_RK: Tensor | None,
        confident_RK: Tensor | None,
        noise: Noise,
    ) -> Tensor:
        """Choose the trunk's tokens and keep those behind accepted drafts; returns how many each row kept [R]."""
        params, new = self.params, logits_RSV.shape[1]
        steps = self.steps[:new]
        flat = logits_RSV.flatten(0, 1)
        targets, logprobs = (x.view(-1, new) for x in choose(flat, params.temperature, noise.flatten()))
        accepted = None
        if drafts_RK is not None:
            accepted = verify_draft(targets, drafts_RK)
            if confident_RK is not None:
                accepted = confident_RK.long().cumprod(1).sum(1)
                targets = torch.where(steps < accepted[:, None], F.pad(drafts_RK, (0, 1)), targets)
                logprobs = logprobs_of(flat, targets.flatten(), params.temperature).view(-1, new)
        kept = live.alive.long() if accepted is None else accepted + 1
        kept = torch.minimum(kept, params.max_completion_tokens - live.count) * live.alive
        is_stop = (targets[..., None] == self.stops).any(-1) & (steps < kept[:, None])
        stopped = is_stop.any(1)
        kept = torch.where(stopped, is_stop.long().argmax(1) + 1, kept)
        cut = None
        if self.strings is not None:
            kept, cut = self._until_strings(live, targets, kept, stopped)
            stopped = stopped | cut
        taken = steps < kept[:, None]
        if not bool(torch.isfinite(logprobs.where(taken, logprobs.new_zeros(())).sum())):
            broken = self._abort(live, (taken & ~torch.isfinite(logprobs)).any(1))
            kept, stopped = kept * ~broken, stopped & ~broken
        at = live.index[:, None], live.count[:, None] + steps
        self.token_ids[at], self.logprobs[at] = targets, logprobs
        if accepted is not None:
            self._note_drafts(live, accepted, kept, new - 1, confident_RK is not None)
        live.last = targets.gather(1, (kept - 1).clamp(min=0)[:, None])[:, 0]
        live.count = live.count + kept
        self.counts[live.index] = live.count
        self.stopped[live.index] |= stopped
        if cut is not None:
            self.cut[live.index] |= cut & stopped
        if self.drafter:
            self.drafter.keep(live, targets, hidden_RSD, kept)
        return kept

    def _until_strings(
        self, live: Rows, targets_RS: Tensor, kept_R: Tensor, stopped_R: Tensor
    ) -> tuple[Tensor, Tensor]:
        """How many tokens each row keeps [R] up to its first stop string, and which rows [R] end with one."""
        assert self.strings is not None
        kept, cut = kept_R.tolist(), [False] * len(kept_R)
        rows = zip(live.index.tolist(), live.count.tolist(), targets_RS.tolist(), stopped_R.tolist(), strict=True)
        for i, (index, count, targets, stopped) in enumerate(rows):
            new = targets[: kept[i] - stopped]  # a stop token is no text
            end = self.strings.end([*self.token_ids[index, :count].tolist(), *new], count) if new else None
            if end is not None:
                kept[i], cut[i] = end - count, True
        return torch.tensor(kept, device=self.device), torch.tensor(cut, device=self.device)

    def _abort(self, live: Rows, broken_R: Tensor) -> Tensor:
        """End the rows whose logits are not finite; returns which [R] keep nothing of this forward."""
        self.aborted[live.index] |= broken_R
        live.alive = live.alive & ~broken_R
        return broken_R

    # ---- what is noted beside the tokens ------------------------------------------------------------------------

    def _note_drafts(self, live: Rows, accepted_R: Tensor, kept_R: Tensor, depth: int, margin: bool) -> None:
        steps, alive = self.steps[:depth], live.alive[:, None]
        taken = (steps < torch.minimum(accepted_R, kept_R)[:, None]) & alive
        self.accepted[live.index, :depth] += taken
        self.depths[live.index[:, None], live.count[:, None] + steps] = ((steps + 1) * taken).to(torch.uint8)
        if margin:
            self.fallbacks[live.index] += live.alive & (accepted_R < depth)
        if self.controller:
            agreed = (steps < accepted_R[:, None]) & alive
            self.controller.observe(self.alive, agreed.sum(0).tolist())

    def _note_routing(self, live: Rows, new: int) -> None:
        experts = self.trunk.routing()
        experts = experts.view(-1, new, *experts.shape[1:])
        assert self.routing is not None  # since the prefill
        at = live.index[:, None], (live.count - 1)[:, None] + self.steps[:new]
        self.routing[at] = experts.to(torch.int16)

    # ---- the result ---------------------------------------------------------------------------------------------

    def groups(self) -> list[RolloutGroup]:
        size = self.params.group_size
        completions = self._completions()
        return [
            RolloutGroup(prompt, completions[i * size : (i + 1) * size], self.prompt_routing.get(i))
            for i, prompt in enumerate(self.prompts)
        ]

    def _completions(self) -> list[Completion]:
        token_ids, logprobs, depths = self.token_ids.tolist(), self.logprobs.tolist(), self.depths.tolist()
        stopped, aborted, cut = self.stopped.tolist(), self.aborted.tolist(), self.cut.tolist()
        stats = zip(*(x.tolist() for x in (self.forwards, self.drafted, self.accepted, self.fallbacks)), strict=True)
        routing = None
        if self.routing is not None:
            routing = self.routing.cpu()
            # No token follows the last one, so it was not read for one: its place holds some draft's experts, or none.
            routing[torch.arange(len(routing)), self.counts.cpu() - 1] = -1
        completions = []
        for row, (count, (forwards, drafted, accepted, fallbacks)) in enumerate(
            zip(self.counts.tolist(), stats, strict=True)
        ):
            ids = token_ids[row][:count]
            text = str(self.engine.policy.tokenizer.decode(ids[:-1] if stopped[row] and not cut[row] else ids))
            reason: FinishReason = "abort" if aborted[row] else "stop" if stopped[row] else "length"
            completions.append(
                Completion(
                    token_ids=ids,
                    logprobs=logprobs[row][:count],
                    text=self.strings.cut(text) if self.strings else text,
                    finish_reason=reason,
                    policy_version=self.engine.version,
                    draft=DraftStats(forwards, drafted, accepted, fallbacks, depths[row][:count]),
                    routing=None if routing is None else routing[row, :count],
                )
            )
        return completions


def _join(caches: Sequence[Any]) -> Any:
    return caches[0].join(caches[1:]) if len(caches) > 1 else caches[0]

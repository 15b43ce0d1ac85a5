"""One device, one copy of the policy, no Ray: prefill each prompt once, decode its group, draft and verify.

Axes: P prompts, G completions each, R live rows, S = k + 1 tokens of a verifying forward, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from policies.absorbed import AbsorbedTrunk, new_cache
from policies.mtp import AbsorbedHead
from policies.policy import Policy, digest
from rollout.group import Completion, DraftStats, FinishReason, Prompt, RolloutGroup
from rollout.sampling import SamplingParams, choose, logprobs_of, row_key
from rollout.speculative import verify_draft


class RolloutError(RuntimeError):
    """Sampling cannot go on; the message names the prompt or the setting, and the way out."""


class Engine:
    """Samples groups from its own copy of a policy. Adapters of `policy` must be merged already."""

    def __init__(self, policy: Policy, dtype: torch.dtype = torch.float32) -> None:
        self.policy, self.dtype = policy, dtype
        self.version = 0
        self._derive()

    def publish(self, weights: Mapping[str, Tensor], version: int) -> str:
        """Take over new weights and rebuild everything derived from them; returns the digest of what was taken."""
        self.policy.load_weights(weights)
        self._derive()
        self.version = version
        return digest(weights)

    def _derive(self) -> None:
        self.trunk = AbsorbedTrunk(self.policy.trunk, self.dtype, self.policy.max_length)
        self.head = AbsorbedHead(self.policy.mtp, self.trunk) if self.policy.mtp is not None else None

    def check(self, prompts: Sequence[Prompt], params: SamplingParams) -> None:
        """Raises RolloutError or ValueError, naming prompt or key, before anything is computed."""
        params.check()
        if params.draft_tokens and self.head is None:
            raise RolloutError(
                f"rollout.draft_tokens={params.draft_tokens}, but this policy has no MTP head; "
                "set it to 0, or load the policy with a head"
            )
        vocabulary, limit = len(self.trunk.embedding), self.policy.max_length
        for token in params.stop_token_ids:
            if not 0 <= token < vocabulary:
                raise ValueError(f"rollout.stop_token_ids: {token} is outside the vocabulary of {vocabulary} tokens")
        for prompt in prompts:
            length = len(prompt.token_ids)
            if length == 0:
                raise RolloutError(f"prompt {prompt.prompt_id!r} has no tokens; a policy continues at least one")
            if outside := [token for token in prompt.token_ids if not 0 <= token < vocabulary]:
                raise RolloutError(
                    f"prompt {prompt.prompt_id!r} holds token {outside[0]}, outside the vocabulary of {vocabulary}; "
                    "use the policy's own tokenizer"
                )
            if length + params.max_completion_tokens > limit:
                raise RolloutError(
                    f"prompt {prompt.prompt_id!r} has {length} tokens; with rollout.max_completion_tokens="
                    f"{params.max_completion_tokens} it passes the context of {limit}: shorten one of them"
                )

    @torch.inference_mode()
    def sample(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        on_finished: Callable[[int], None] | None = None,
    ) -> list[RolloutGroup]:
        """One group per prompt. `on_finished` hears how many completions have ended since it was last called."""
        self.check(prompts, params)
        batch = _Batch(self, prompts, params)
        ended = batch.ended
        while True:
            if ended and on_finished:
                on_finished(ended)
            if not batch.rows:
                break
            ended = batch.forward()
        return batch.groups()


@dataclass
class _Rows:
    """State of the live rows, all [R]. A row stays for a while after its end (`alive` False), then leaves."""

    index: Tensor
    keys_R2: Tensor
    prompt_length: Tensor
    last: Tensor
    count: Tensor
    alive: Tensor

    def select(self, kept: Tensor) -> _Rows:
        return _Rows(**{name: value[kept] for name, value in vars(self).items()})


class _Batch:
    def __init__(self, engine: Engine, prompts: Sequence[Prompt], params: SamplingParams) -> None:
        self.engine, self.prompts, self.params = engine, prompts, params
        self.device = engine.trunk.device
        self.depth = params.draft_tokens
        total, limit = len(prompts) * params.group_size, params.max_completion_tokens
        self.token_ids = torch.zeros(total, limit, dtype=torch.long, device=self.device)
        self.logprobs = torch.zeros(total, limit, device=self.device)
        self.counts = torch.zeros(total, dtype=torch.long, device=self.device)
        self.stopped = torch.zeros(total, dtype=torch.bool, device=self.device)
        self.forwards = torch.zeros(total, dtype=torch.long, device=self.device)
        self.drafted = torch.zeros(total, self.depth, dtype=torch.long, device=self.device)
        self.accepted = torch.zeros(total, self.depth, dtype=torch.long, device=self.device)
        self.stops = torch.tensor(params.stop_token_ids, dtype=torch.long, device=self.device)
        if total:
            self._prefill()
        else:
            self.rows = self.ended = 0

    def _prefill(self) -> None:
        """Every prompt once; its latents become the prefix that its rows share, its last hidden state their start."""
        trunk, head, group = self.engine.trunk, self.engine.head, self.params.group_size
        lengths = torch.tensor([len(p.token_ids) for p in self.prompts], device=self.device)
        longest = int(lengths.max())
        padded = [p.token_ids + [0] * (longest - len(p.token_ids)) for p in self.prompts]
        token_ids = torch.tensor(padded, device=self.device)
        positions = torch.arange(longest, device=self.device).expand_as(token_ids)
        capacity = self.params.max_completion_tokens + self.depth + 1
        cache = trunk.cache(len(padded), longest)
        hidden = trunk(token_ids, positions, cache)
        cache.advance(lengths)
        self.cache = cache.fan_out(group, capacity)
        if self.depth:
            assert head is not None
            cache = new_cache(head.config, 1, len(padded), longest, trunk.dtype, self.device, first=1)
            head(token_ids, torch.nn.functional.pad(hidden, (0, 0, 1, 0))[:, :-1], positions, cache)
            cache.advance(lengths)
            self.head_cache = cache.fan_out(group, capacity)
        hidden = hidden[torch.arange(len(padded), device=self.device), lengths - 1]
        keys = [row_key(self.params, prompt.prompt_id, sample) for prompt in self.prompts for sample in range(group)]
        total = len(keys)
        self.live = _Rows(
            index=torch.arange(total, device=self.device),
            keys_R2=torch.tensor(keys, dtype=torch.int32, device=self.device),
            prompt_length=lengths.repeat_interleave(group),
            last=torch.zeros(total, dtype=torch.long, device=self.device),
            count=torch.zeros(total, dtype=torch.long, device=self.device),
            alive=torch.ones(total, dtype=torch.bool, device=self.device),
        )
        self.rows = total
        logits = trunk.logits(hidden).repeat_interleave(group, dim=0)[:, None]
        none = self.live.last.new_zeros(total, 0)
        self._settle(logits, hidden.repeat_interleave(group, dim=0)[:, None], none)
        self.ended = self._retire()

    def forward(self) -> int:
        """Draft k tokens a row, verify them in one forward of the trunk; returns how many rows ended."""
        live = self.live
        drafts = self._draft() if self.depth else live.last.new_zeros(self.rows, 0)
        inputs = torch.cat([live.last[:, None], drafts], dim=1)
        steps = torch.arange(inputs.shape[1], device=self.device)
        positions = (live.prompt_length + live.count - 1)[:, None] + steps
        positions = positions.clamp(max=self.engine.policy.max_length - 1)
        hidden = self.engine.trunk(inputs, positions, self.cache)
        self.forwards[live.index] += live.alive
        self.drafted[live.index] += live.alive[:, None]
        self.cache.advance(self._settle(self.engine.trunk.logits(hidden), hidden, drafts))
        return self._retire()

    def _draft(self) -> Tensor:
        """[R, k] tokens from the head, chosen with the very noise that the trunk's choice will use."""
        live, head, trunk = self.live, self.engine.head, self.engine.trunk
        assert head is not None
        limit = self.engine.policy.max_length - 1
        steps = torch.arange(self.fresh_tokens.shape[1], device=self.device)
        positions = (live.prompt_length + live.count - self.fresh)[:, None] + steps
        out = head(self.fresh_tokens, self.fresh_hidden, positions.clamp(max=limit), self.head_cache)
        self.head_cache.advance(self.fresh)
        out = out[torch.arange(self.rows, device=self.device), self.fresh - 1]
        drafts = []
        for d in range(self.depth):
            position = live.count + d
            drafts.append(choose(trunk.logits(out), self.params.temperature, live.keys_R2, position))
            if d + 1 < self.depth:
                position = (live.prompt_length + position)[:, None].clamp(max=limit)
                out = head(drafts[-1][:, None], out[:, None], position, self.head_cache)[:, 0]
                self.head_cache.advance(1)
        self.head_cache.advance(1 - self.depth)
        return torch.stack(drafts, dim=1)

    def _settle(self, logits_RSV: Tensor, hidden_RSD: Tensor, drafts_RK: Tensor) -> Tensor:
        """Choose the trunk's tokens and keep those behind accepted drafts; returns how many each row kept [R]."""
        live, params = self.live, self.params
        rows, new = logits_RSV.shape[:2]
        steps = torch.arange(new, device=self.device)
        flat = logits_RSV.reshape(rows * new, -1)
        keys = live.keys_R2.repeat_interleave(new, dim=0)
        places = (live.count[:, None] + steps).reshape(-1)
        chosen = choose(flat, params.temperature, keys, places)
        logprobs = logprobs_of(flat, chosen, params.temperature).view(rows, new)
        targets = chosen.view(rows, new)
        accepted = verify_draft(targets, drafts_RK)
        kept = torch.minimum(accepted + 1, params.max_completion_tokens - live.count) * live.alive
        is_stop = torch.isin(targets, self.stops) & (steps < kept[:, None])
        stopped = is_stop.any(1)
        kept = torch.where(stopped, is_stop.int().argmax(1) + 1, kept)
        taken = steps < kept[:, None]
        if not bool(torch.isfinite(logprobs[taken]).all()):
            self._refuse_non_finite(logprobs, taken)
        at = (live.index[:, None].expand(-1, new)[taken], (live.count[:, None] + steps)[taken])
        self.token_ids[at], self.logprobs[at] = targets[taken], logprobs[taken]
        if drafts_RK.shape[1]:
            self.accepted[live.index] += steps[:-1] < torch.minimum(accepted, kept)[:, None]
        live.count = live.count + kept
        live.last = targets.gather(1, (kept - 1).clamp(min=0)[:, None])[:, 0]
        self.counts[live.index] = live.count
        self.stopped[live.index] |= stopped
        self.fresh, self.fresh_tokens, self.fresh_hidden = kept, targets, hidden_RSD
        return kept

    def _retire(self) -> int:
        """End rows that stopped or are full; returns how many.

        They leave when they are an eighth of the batch: moving the caches at every single end would cost more.
        """
        live = self.live
        ending = live.alive & (self.stopped[live.index] | (live.count >= self.params.max_completion_tokens))
        live.alive = live.alive & ~ending
        kept = live.alive.nonzero()[:, 0]
        if len(kept) == 0:
            self.rows = 0
        elif len(kept) <= self.rows * 7 // 8:
            self.rows = len(kept)
            self.live = self.live.select(kept)
            self.cache.select(kept)
            if self.depth:
                self.head_cache.select(kept)
            self.fresh, self.fresh_tokens = self.fresh[kept], self.fresh_tokens[kept]
            self.fresh_hidden = self.fresh_hidden[kept]
        return int(ending.sum())

    def _refuse_non_finite(self, logprobs: Tensor, taken: Tensor) -> None:
        bad = (~torch.isfinite(logprobs) & taken).any(1).nonzero()[:, 0]
        rows = self.live.index[bad].tolist()
        names = sorted({self.prompts[row // self.params.group_size].prompt_id for row in rows})
        raise RolloutError(
            f"the policy's logits are not finite for {len(rows)} rows of prompts {names[:4]}: the weights hold NaN "
            "or overflow; resume from an earlier checkpoint with a lower learner.learning_rate"
        )

    def groups(self) -> list[RolloutGroup]:
        group = self.params.group_size
        token_ids, logprobs = self.token_ids.tolist(), self.logprobs.tolist()
        counts, stopped = self.counts.tolist(), self.stopped.tolist()
        forwards, drafted, accepted = self.forwards.tolist(), self.drafted.tolist(), self.accepted.tolist()
        stop_ids = set(self.params.stop_token_ids)
        completions = []
        for row, count in enumerate(counts):
            ids = token_ids[row][:count]
            visible = ids[:-1] if stopped[row] and ids[-1] in stop_ids else ids
            reason: FinishReason = "stop" if stopped[row] else "length"
            completions.append(
                Completion(
                    token_ids=ids,
                    logprobs=logprobs[row][:count],
                    text=str(self.engine.policy.tokenizer.decode(visible)),
                    finish_reason=reason,
                    policy_version=self.engine.version,
                    draft=DraftStats(forwards[row], drafted[row], accepted[row]),
                )
            )
        return [RolloutGroup(prompt, completions[i * group : (i + 1) * group]) for i, prompt in enumerate(self.prompts)]

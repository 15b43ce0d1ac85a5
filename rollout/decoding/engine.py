"""One copy of the policy on one device, without Ray. A rollout worker has one.

The engine holds weights and everything derived from them; `rollout.decoding.shard` decodes with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from policies.allocator import keep_freed_memory
from policies.policy import Policy
from rollout.backends import Decoder, derive
from rollout.cost_table import MAX_DEPTH, CostTable, Workload
from rollout.decoding.batch import Batch
from rollout.decoding.shard import Decoding
from rollout.decoding.stage import Stage
from rollout.faults import RolloutError, not_finite, prompt_fault
from rollout.group import Prompt, RolloutGroup
from rollout.sampling import PLAIN, Copies, DraftVocabulary, SamplingParams
from rollout.weight_sync.checksums import Held, checksums


class Engine:
    """Samples groups from its own copy of a policy, whose adapters must be merged already.

    At most `max_rows` completions are decoded together; the others of a call wait until finished ones leave.
    """

    def __init__(
        self,
        policy: Policy,
        dtype: torch.dtype = torch.float32,
        *,
        max_rows: int = 256,
        costs: CostTable | None = None,
        copies: Copies = PLAIN,
    ) -> None:
        """Makes an engine; by `copies` the matrices that it decodes with have fewer bits than those that it holds."""
        keep_freed_memory()
        self.policy, self.dtype, self.max_rows, self.costs = policy, dtype, max_rows, costs
        self.copies, self.version = copies, 0
        self.graphs: list[Any] = []  # those of rollout.compiled, once a call asks for them
        self.stage = Stage(policy.tokenizer)
        self._derive()

    def sync_weights(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Copy new weights and rebuild everything derived from them."""
        self._release()
        self.policy.load_weights(weights)
        self._derive()
        self.version = version

    def forget(self) -> None:
        """Drop what was derived from the weights, until the next publication."""
        self._release()
        del self.trunk, self.head

    def _release(self) -> None:
        self.derived = False
        for graphs in self.graphs:
            graphs.release()

    def held(self) -> Held:
        """The digests of the weights that are decoded with; empty where nothing was derived from the newest ones."""
        return checksums(self.policy.weights()) if self.derived else {}

    def _derive(self) -> None:
        self.trunk, self.head = derive(self.policy, self.dtype, self.copies)
        self.draft_vocabulary = None
        if self.head is not None and self.head.draft_ids is not None:
            self.draft_vocabulary = DraftVocabulary(self.head.draft_ids, len(self.trunk.embedding))
        self.derived = True

    @property
    def decoder(self) -> Decoder:
        """Gives what a shard decodes with until the next publication."""
        tokenizer, context = self.policy.tokenizer, self.policy.max_length
        parts = self.trunk, self.head, self.draft_vocabulary, tokenizer, context
        graphs = self.graphs if self.copies == PLAIN else None
        return Decoder(*parts, self.version, self.max_rows, self.costs, graphs)

    def check(self, prompts: Sequence[Prompt], params: SamplingParams) -> None:
        """Raises RolloutError or ValueError, which name the prompt or key, before anything is computed."""
        self._check_params(params)
        for prompt in prompts:
            if fault := self._fault(params, prompt):
                raise RolloutError(fault)

    def _check_params(self, params: SamplingParams) -> None:
        params.check()
        if params.draft_tokens and self.head is None:
            raise RolloutError(
                f"rollout.draft_tokens={params.draft_tokens}, but this policy has no MTP head; set it to 0, or load "
                "the policy with a draft head"
            )
        if params.accept == "margin" and (self.head is None or params.draft_tokens == 0):
            raise RolloutError(
                "accept=margin takes drafts unverified, but there are none: use a policy with an MTP head and drafts"
            )
        if params.record_routing and not getattr(self.trunk, "has_routers", False):
            raise RolloutError(
                "learner.routing_replay: this policy has no experts or dynamic heads to be replayed; drop it"
            )
        vocabulary = len(self.trunk.embedding)
        for token in params.stop_token_ids:
            if not 0 <= token < vocabulary:
                raise ValueError(f"rollout.stop_token_ids: {token} is outside the vocabulary of {vocabulary} tokens")

    def _fault(self, params: SamplingParams, prompt: Prompt) -> str | None:
        return prompt_fault(prompt, params, len(self.trunk.embedding), self.policy.max_length)

    @torch.inference_mode()
    def sample(
        self, prompts: Sequence[Prompt], params: SamplingParams, on_finished: Callable[[int], None] | None = None
    ) -> list[RolloutGroup]:
        """Samples one group per prompt. `on_finished` gets how many completions have ended since it was last called.

        If a prompt cannot be continued or logits are not finite, the other prompts are still sampled, and RolloutError
        is raised at the end with their `groups`.
        """
        self._check_params(params)
        episodes, prompts, faults = self.stage.begin_episodes(prompts, params, partial(self._fault, params))
        lacks_costs = self.costs is None or (self.costs.graphs is None and params.compiled)
        if params.draft_tokens is None and self.head is not None and prompts and lacks_costs:
            longest = max(len(prompt.token_ids) for prompt in prompts)
            self.measure_costs(Workload.of(params, len(prompts) * params.group_size, longest))
        if episodes is None:
            on_cpu = self.policy.device.type == "cpu"  # elsewhere a round costs the same for few rows as for many
            shares = on_cpu and params.group_size > 1 and getattr(self.trunk, "rows_can_part", True)
            batch = Batch(self.decoder, prompts, params, shares=shares)
        else:
            from rollout.decoding.episode_batch import EpisodeBatch

            batch = EpisodeBatch(self.decoder, prompts, params, episodes)
        decoding, announced = Decoding(batch), 0
        while True:
            if on_finished and batch.ended > announced:  # some end with their first token, in the prefill
                on_finished(batch.ended - announced)
                announced = batch.ended
            if decoding.done:
                break
            decoding.decode_round()
        groups = batch.groups()
        if episodes:
            episodes.finish(groups)
        if fault := not_finite(groups):
            faults.append(fault)
        if faults:
            raise RolloutError("\n".join(faults), groups)
        return groups

    def close(self) -> None:
        """End the processes of the tools, where there are any."""
        self.stage.close()

    @torch.inference_mode()
    def measure_costs(self, work: Workload, depth: int = MAX_DEPTH) -> CostTable:
        """Time drafting and verifying for this work, with at most as many rows as are decoded at once. The depth
        controller uses the result from now on."""
        from rollout.decoding.costs import measure

        self.costs = measure(self.decoder, replace(work, rows=min(work.rows, self.max_rows)), depth)
        return self.costs

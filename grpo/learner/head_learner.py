"""Teaching the draft head of a frozen policy: forward KL to the trunk's own distributions, unrolled over the depths.

The trunk reads a text once, without gradient; its hidden states serve every pass (`grpo.learner.lessons`).

FLOPs per token of a pass, with P parameters in the draft head, depth k and K drafted tokens of V: 6·P·k for it and
(2 + 4·k)·D·K for the LM head (teacher once, draft and gradient at each depth). SmolLM2-135M with k = 4: 0.12 + 0.51
GFLOP with V = 49,152, 0.12 + 0.09 with K = 8,192. The reading once is 0.25.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo.config.learner import LearnerOptions, MTPOptions
from grpo.config.mtp import HeadOptions
from grpo.learner import state as learner_state
from grpo.learner.batch import MicroBatch, micro_batches
from grpo.learner.learner import Learner
from grpo.learner.lessons import Lesson
from grpo.learner.likelihood import Likelihood
from grpo.learner.prepare import recorded
from grpo.learner.row import PackedRow
from grpo.learner.terms.draft_head import DraftHeadTerm
from policies.logprobs import CHUNK_ELEMENTS
from policies.policy import Policy
from rollout.group import RolloutGroup
from rollout.sampling import DraftVocabulary, Noise, SamplingParams, pick, row_key

WARM_UP = 20  # updates over which the learning rate rises
GAIN = 0.005  # tokens a forward of the trunk: an epoch that gains less has gained nothing
RATES = (1.0, 0.25, 0.0625)  # of the peak; an epoch that gains nothing goes to the next one, and the last one ends


class HeadLearner(Learner):
    """A learner whose trunk is frozen: only `policy.mtp` moves, and is all that a checkpoint keeps of the policy.

    `best` are the tokens a forward of held-out rollouts that the draft head would give, None before the first epoch;
    `stage` counts the epochs that gained nothing.
    """

    def __init__(self, policy: Policy, options: HeadOptions, *, temperature: float, seed: int) -> None:
        policy.trunk.requires_grad_(False)
        self.warm_up = 1.0
        self.term = DraftHeadTerm(policy, MTPOptions(depth=options.depth, learning_rate=options.learning_rate))
        super().__init__(
            policy,
            LearnerOptions(tokens_per_micro_batch=options.tokens_per_update),
            [self.term],
            Likelihood(policy, temperature=temperature),
            schedule=lambda _: self.warm_up * RATES[self.stage],
        )
        self.head_options, self.seed = options, seed
        self.best: float | None = None
        self.stage = 0

    @property
    def ended(self) -> bool:
        """Tells whether teaching has ended: the draft head gains nothing at the lowest rate either."""
        return self.stage == len(RATES)

    def depth_at(self, epoch: int) -> int:
        """1 in the first epoch, then one more in each, up to `depth`."""
        return min(epoch, self.head_options.depth)

    @property
    def tv(self) -> bool:
        """Tells whether an epoch minimises total variation. The first do not: where the draft head has learned nothing,
        that gradient vanishes. KL alone would leave it as unsure as the mean of all that the trunk could mean."""
        return self.stage > 0

    # ---- the corpus ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def read(
        self,
        rows: Sequence[PackedRow],
        groups: Sequence[RolloutGroup] = (),
        params: SamplingParams | None = None,
    ) -> list[Lesson]:
        """One forward of the trunk over rows; those of `groups` that `params` sampled know their noise."""
        lessons = []
        for mini in micro_batches(rows, self.options.tokens_per_micro_batch, self.policy.device):
            tokens = mini.token_ids, mini.position_ids, mini.head_segment, mini.turn
            keys = noise_keys(mini, groups, params) if params else None
            lessons.append(Lesson(*tokens, self.likelihood.preceding(mini), keys))
        return lessons

    @torch.no_grad()
    def frequent_tokens(self, lessons: Sequence[Lesson], count: int) -> Tensor | None:
        """The `count` tokens that the policy says most often in these rollouts, ascending, all of its stop tokens among
        them; None if that is every token.

        Counts are expected ones, Σ p over the sampled positions: they rank also what was not sampled by chance.
        """
        head, stops = self.policy.lm_head, self.policy.stop_token_ids
        if count >= len(head):
            return None
        mass = torch.zeros(len(head), device=head.device)
        for lesson in lessons:
            for hidden in lesson.preceding[lesson.turn > 0].split(max(1, CHUNK_ELEMENTS // len(head))):
                mass += (F.linear(hidden, head).float() / self.likelihood.temperature).softmax(-1).sum(0)
        mass[stops] = float("inf")
        return mass.topk(count).indices.sort().values

    # ---- an epoch -----------------------------------------------------------------------------------------------

    def teach(self, taught: Sequence[Lesson], held_out: Sequence[Lesson], epoch: int, step: int) -> dict[str, float]:
        """One pass over the corpus, in an order of its own: one optimizer update for every lesson.

        An epoch that gains nothing in the held-out rollouts is undone, and the next one has a lower rate; but not one
        in which the depth has grown. Raises NonFiniteStep, which names the `step`. Then, too, the epoch is undone.
        """
        if self.best is None:
            self.best = 1.0 + sum(self.acceptance(held_out))
        updates, version, before = self.updates, self.policy_version, self._copy()
        try:
            metrics = self._pass_over(taught, epoch, step)
            accepted = self.acceptance(held_out)
        except BaseException:
            self._undo(before)
            self.update.count, self.policy_version = updates, version
            raise
        depth, tokens_per_forward = self.depth_at(epoch), 1.0 + sum(accepted)
        grows = depth < self.head_options.depth or (epoch > 1 and depth > self.depth_at(epoch - 1))
        if grows or tokens_per_forward >= self.best + GAIN:
            self.best = tokens_per_forward
        else:
            self._undo(before)
            self.stage += 1
        self.policy_version = version + 1
        shares = {f"draft/held_out_acceptance_depth_{d}": share for d, share in enumerate(accepted, start=1)}
        return metrics | {"draft/held_out_tokens_per_forward": tokens_per_forward} | shares

    def _pass_over(self, taught: Sequence[Lesson], epoch: int, step: int) -> dict[str, float]:
        depth, order, loss = self.depth_at(epoch), list(range(len(taught))), f"loss/mtp{'_tv' if self.tv else ''}"
        random.Random(f"epoch/{self.seed}/{epoch}").shuffle(order)
        self.term.divergence = "tv" if self.tv else "kl"
        metrics: dict[str, float] = {}
        tokens, covered, losses = 0, 0, 0.0
        began = time.perf_counter()
        for number, at in enumerate(order, start=1):
            lesson = taught[at]
            self.warm_up = min(1.0, number / WARM_UP) if epoch == 1 else 1.0
            metrics = self.forward_backward(recorded([lesson], step, depth)) | self.optim_step()
            tokens += lesson.tokens
            losses += metrics[loss] * lesson.tokens
            if self.policy.draft_ids is not None:
                covered += int(torch.isin(lesson.token_ids[lesson.turn > 0], self.policy.draft_ids).sum())
        coverage = {} if self.policy.draft_ids is None else {"draft/vocabulary_coverage": covered / tokens}
        return {
            "learner/learning_rate": metrics["learner/learning_rate"],
            "learner/updates": float(len(order)),
            "curriculum/draft_depth": float(depth),
            "speed/trained_tokens_per_second": tokens / (time.perf_counter() - began),
            loss: losses / tokens,
            **coverage,
        }

    def acceptance(self, lessons: Sequence[Lesson]) -> list[float]:
        """Measures which share of its drafts at depths 1 … `depth` the trunk would have taken in these rollouts, if a
        chain had been drafted after every token."""
        drafts, hits = (torch.zeros(self.head_options.depth) for _ in range(2))
        for lesson in lessons:
            for d, (drafted, right) in enumerate(self.drafts(lesson)):
                drafts[d] += int(drafted.sum())
                hits[d] += int(right.sum())
        if not drafts[0]:
            raise ValueError(
                "no held-out rollout has two tokens, so nothing tells what a draft is worth; raise "
                "rollout.max_completion_tokens, or sample more (steps, prompts_per_step)"
            )
        return (hits / drafts.clamp(min=1)).tolist()

    @torch.no_grad()
    def drafts(self, lesson: Lesson) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields for depths 1 … `depth` where a chain has a draft so deep [B, T], and where the trunk takes it.

        A draft is drawn with the noise that its token was sampled with, so it is right where it equals that token, and
        taken where those before it are right too (contract 3).
        """
        assert lesson.noise_keys is not None
        policy, size, turn = self.policy, len(self.policy.lm_head), lesson.turn
        head = policy.lm_head if policy.draft_ids is None else policy.lm_head[policy.draft_ids]
        vocabulary = None if policy.draft_ids is None else DraftVocabulary(policy.draft_ids, size)
        ids, keys = lesson.token_ids.flatten(), lesson.noise_keys.flatten(0, 1)
        places = (lesson.position_ids - lesson.prompt_lengths[:, None]).flatten()
        accepted = turn > 0
        for d, output in enumerate(lesson.unrolled(policy, self.head_options.depth), start=1):
            drafted = (turn > 0) & (F.pad(turn, (0, d), value=-1)[:, d:] == turn)
            right = torch.zeros_like(ids, dtype=torch.bool)
            for at in drafted.flatten().nonzero()[:, 0].split(max(1, CHUNK_ELEMENTS // len(head))):
                noise = Noise(keys[at + d], places[at + d], size)
                logits = F.linear(output.flatten(0, 1)[at], head)
                right[at] = pick(logits, self.likelihood.temperature, noise, vocabulary) == ids[at + d]
            accepted = accepted & right.view_as(turn)
            yield drafted, accepted

    # ---- state --------------------------------------------------------------------------------------------------

    def _copy(self) -> dict[str, dict[str, Tensor]]:
        """Weights and moments as they are now."""
        parts = learner_state.collect_tensors(*self._stateful)
        return {file: {name: tensor.clone() for name, tensor in tensors.items()} for file, tensors in parts.items()}

    def _undo(self, before: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.drop()
        learner_state.put(before, *self._stateful)

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict]:
        """A learner's, with the draft vocabulary, where there is one, and how far the epochs have come."""
        tensors, state = super().state()
        tensors |= {} if self.policy.draft_ids is None else {"draft": {"ids": self.policy.draft_ids}}
        return tensors, state | {"best": self.best, "stage": self.stage}

    def load_state(self, tensors: Mapping[str, Mapping[str, Tensor]], state: dict) -> None:
        super().load_state(tensors, state)
        self.best, self.stage = state["best"], state["stage"]
        self.policy.draft_ids = tensors["draft"]["ids"].to(self.policy.device) if "draft" in tensors else None


def noise_keys(mini: MicroBatch, groups: Sequence[RolloutGroup], params: SamplingParams) -> Tensor:
    """[B, T, 2]: the keys of the noise that chose each token of these groups' completions; zero in prompts.

    `PackedRow.group` is the place in `groups`, `Sample.index` that of the completion in its group. A token that several
    completions have in common stands once, with the key of one of them.
    """
    keys_C2 = torch.tensor(
        [
            row_key(params, groups[row.group].prompt.prompt_id, sample.index)
            for row in mini.rows
            for sample in row.samples
        ],
        dtype=torch.int32,
        device=mini.token_ids.device,
    )
    keys = keys_C2.new_zeros(mini.token_ids.numel(), 2)
    keys[mini.places[mini.numbers]] = keys_C2[mini.cells // mini.mask.shape[1]]
    return keys.view(*mini.token_ids.shape, 2)

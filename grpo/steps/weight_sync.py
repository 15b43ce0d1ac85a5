"""Weight sync: samplers get what was learned, so that nobody samples with anything else (contracts 5 and 13)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, NoReturn

from torch import Tensor

from grpo.learner.learner import Learner
from grpo.learner.likelihood import logprobs_of_groups
from grpo.learner.terms.policy import FARTHEST
from grpo.run.stop import Stopped
from grpo.steps.loop import Run
from grpo.steps.pool import open_run_pool
from policies.policy import Policy
from policies.sharding import routed_experts
from rollout.faults import RolloutError
from rollout.group import Prompt, RolloutGroup
from rollout.pool import Pool
from rollout.sampling import SamplingParams
from rollout.weight_sync.checksums import first_difference
from rollout.weight_sync.sync_check import Agreement, Scores, compare, sync_check_params, sync_check_prompts

ADVICE = (
    "Nothing was sampled with it. The last step is saved: go on with --resume auto. If this comes again, the sampler "
    "cannot run this policy as the learner does; sample with rollout.workers=0, or in float32"
)

# Two experts of nearly equal score may change places between sampler and learner, which moves a log-probability by more
# than rounding does. That does not happen twice, with other prompts, and a fault does.
ATTEMPTS = 2
# What the first batch may show where sampler and learner compute in float32, in nats: of one token, and where such a
# change of places may have moved that one, of all tokens in the mean.
MISMATCH, MISMATCH_MEAN = 0.1, 1e-3


@contextmanager
def open_weight_sync(run: Run[Any], learner: Learner, params: SamplingParams) -> Iterator[WeightSync]:
    """Opens the pool of a run, which holds the learner's weights; see `WeightSync`."""
    with closing(open_run_pool(run, learner.policy)) as pool:
        weight_sync = WeightSync(pool, learner, params, run.config.whole_rollout.quantization)
        with run.phase("publishing"):
            weight_sync.sync_weights()
        yield weight_sync


class WeightSync:
    """Hands a learner's weights to the samplers of a pool. `params`: how the run samples.

    A version is admitted when every sampler holds the synced tensors and scores the check's prompts as the
    learner does; otherwise `sync_weights` raises RolloutError, which names the sampler and what differs.
    """

    def __init__(self, pool: Pool, learner: Learner, params: SamplingParams, copies: str = "none") -> None:
        """`copies`: the kind of the samplers' matrices, see policies/decoding/quantized.py."""
        self.copies = copies
        self.pool, self.learner, self.params = pool, learner, params
        self.version: int | None = None  # that the samplers hold; None where it was not admitted
        policy = learner.policy
        self.dtype, self.context = policy.trunk.dtype, policy.max_length
        vocabulary = policy.config.get_text_config().vocab_size
        self.prompts = [sync_check_prompts(vocabulary, self.context, attempt) for attempt in range(ATTEMPTS)]

    def sync_weights(self) -> dict[str, float]:
        """Every rank takes part. Returns sync_check/* of this sync, nothing if a stop has cut it short."""
        learner, version = self.learner, self.learner.policy_version
        weights, ranks = learner.weights(), learner.ranks
        self.version = None
        with suppress(Stopped):  # what was learned counts, and the next sampling is given up
            self.pool.sync_weights(weights, version)
        started = time.perf_counter()
        ranks.from_first(partial(self._compare_checksums, weights, version))
        for attempt in range(ATTEMPTS):
            params = sync_check_params(self.params.at(version, attempt), self.context)
            sampled = ranks.from_first(partial(self._sampled, self.prompts[attempt], params))
            if not sampled:
                self.version = version
                return {}
            scores = self.scores(sampled, params.temperature)
            agreement: Agreement = ranks.from_first(partial(compare, sampled, scores, version, self.dtype))
            if self.copies != "none" and not agreement.fault:
                from grpo.steps.quantized import fault_without_rounding

                groups = next(iter(sampled.values()))
                fault = fault_without_rounding(learner.policy, groups, params.temperature, version)
                agreement = replace(agreement, fault=fault)
            if not agreement.fault:
                break
        if agreement.fault:
            ranks.from_first(partial(_refuse, agreement.fault))
        self.version = version
        return {
            "sync_check/logprob_abs_mean": agreement.mean,
            "sync_check/logprob_abs_max": agreement.most,
            "sync_check/repeats": float(attempt),
            "time/sync_check": time.perf_counter() - started,
        }

    def keep_up(self, run: Run[Any], anew: bool = False) -> None:
        """Publish in a step of a run where the samplers hold other weights than the learner, or `anew`. Samplers that
        have left the learner's GPUs hold none, though a step without an update has moved nothing."""
        moved = anew or self.version != self.learner.policy_version
        if moved or self.learner.ranks.from_first(lambda: self.pool.asleep):
            with run.timed("time/sync"), run.phase("publishing"):
                run.metrics |= self.sync_weights()

    def _sampled(self, prompts: list[Prompt], params: SamplingParams) -> dict[str, list[RolloutGroup]]:
        """The prompts of the check, sampled. Nothing once a stop was asked for: the sync may have been cut short."""
        try:
            return self.pool.sample_on_each(prompts, params)
        except Stopped:
            return {}

    def _compare_checksums(self, weights: Mapping[str, Tensor], version: int) -> None:
        if self.learner.ranks.size > 1:  # ranks that share the weights would have to gather them all again
            return
        for sampler, held in self.pool.held().items():
            if wrong := first_difference(weights, held):
                _refuse(
                    f"{sampler} does not hold what was published as version {version}: the first tensor that differs "
                    f"is {wrong}"
                )

    def scores(self, sampled: Mapping[str, Sequence[RolloutGroup]], temperature: float) -> dict[str, Scores]:
        """The learner's log-probabilities, or where samplers hold matrices in few bits, those of such matrices that are
        made afresh of its weights. Samplers that have made the same tokens are scored together."""
        policy = self.learner.policy
        score: Callable[[Sequence[RolloutGroup], float], Scores] = partial(logprobs_of_groups, policy)
        if self.copies != "none":
            from grpo.steps.quantized import scorer

            score = scorer(policy, self.copies)
        known: dict[str, Scores] = {}
        scores = {}
        for sampler, groups in sampled.items():
            completions = chain.from_iterable(group.completions for group in groups)
            tokens = str([completion.token_ids for completion in completions])
            if tokens not in known:
                known[tokens] = score(groups, temperature)
            scores[sampler] = known[tokens]
        return scores


def _refuse(fault: str) -> NoReturn:
    raise RolloutError(f"{fault}. {ADVICE}")


def refuse_mismatch(policy: Policy, model: str, metrics: Mapping[str, float]) -> None:
    """Raises RolloutError where the first batch shows that sampler and learner compute different models. The prompts of
    the weight-sync check cannot: they are shorter than windows and blocks of many models."""
    most, mean = metrics.get(FARTHEST, 0.0), metrics.get("mismatch/logprob_abs_mean", 0.0)
    if not (most > MISMATCH and (mean > MISMATCH_MEAN or not routed_experts(policy.config))):
        return
    raise RolloutError(
        f"sampler and learner compute different log-probabilities of what was sampled first, by up to {most:.2g} nats "
        f"({FARTHEST}; {MISMATCH:g} is the most in float32), before any update: a model of type "
        f"{policy.config.model_type!r}, {policy.paths}. Nothing was learned. `quartet check {model}` shows what "
        "differs; train another model until that is mended"
    )

"""Groups whose completions go on after a publication, by a budget of tokens in each step (`rollout.partial`).

A completion that is not at its end is, in the next step, a prompt of [prompt | its tokens so far]: the new weights read
it again and continue it. Its noise is keyed by the step of its draw and by its position, as if it had never been cut.
So while the weights stay the same, its tokens are those of a completion that was sampled at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedTokenizerBase

from rollout.faults import OnFinished
from rollout.group import Completion, DraftStats, Prompt, RolloutGroup
from rollout.pool import Pool
from rollout.sampling import SamplingParams


@dataclass(frozen=True)
class Begun:
    """A group that is being sampled. `params` are those of its draw, with the whole length limit; before the first
    budget the group has no completions."""

    params: SamplingParams
    group: RolloutGroup

    def goes_on(self, completion: Completion) -> bool:
        limit = self.params.max_completion_tokens
        return completion.finish_reason == "length" and len(completion.token_ids) < limit

    @property
    def unfinished(self) -> int:
        """How many of its completions go on."""
        return sum(map(self.goes_on, self.group.completions)) if self.group.completions else self.params.group_size


def go_on(
    pool: Pool,
    begun: Sequence[Begun],
    budget: int,
    tokenizer: PreTrainedTokenizerBase,
    on_finished: OnFinished | None = None,
) -> list[Begun]:
    """Each completion gets at most `budget` more tokens. Those of one draw are sampled together: what goes on of them
    has the same length."""
    found: dict[int, RolloutGroup] = {}
    for params in dict.fromkeys(each.params for each in begun):
        of_draw = [(i, each.group) for i, each in enumerate(begun) if each.params == params]
        limit = params.max_completion_tokens
        if new := [(i, group.prompt) for i, group in of_draw if not group.completions]:
            first = replace(params, max_completion_tokens=min(budget, limit))
            groups = pool.sample([prompt for _, prompt in new], first, on_finished)
            found |= {i: group for (i, _), group in zip(new, groups, strict=True)}
        places = [
            (i, sample)
            for i, group in of_draw
            for sample, completion in enumerate(group.completions)
            if begun[i].goes_on(completion)
        ]
        if not places:
            continue
        prompts = [_continued(begun[i].group, sample) for i, sample in places]
        start = len(prompts[0].token_ids) - len(begun[places[0][0]].group.prompt.token_ids)
        more = replace(params, group_size=1, start=start, max_completion_tokens=min(budget, limit - start))
        found |= {i: replace(group, completions=list(group.completions)) for i, group in of_draw if group.completions}
        for (i, sample), group in zip(places, pool.sample(prompts, more, on_finished), strict=True):
            [new_part] = group.completions
            found[i].completions[sample] = joined(found[i].completions[sample], new_part, tokenizer)
    return [replace(each, group=found.get(i, each.group)) for i, each in enumerate(begun)]


def _continued(group: RolloutGroup, sample: int) -> Prompt:
    prompt = group.prompt
    return replace(prompt, token_ids=prompt.token_ids + group.completions[sample].token_ids, first_sample=sample)


def joined(former: Completion, more: Completion, tokenizer: PreTrainedTokenizerBase) -> Completion:
    """One completion of two parts. Reading the first part again counts as a forward: it gives a token."""
    ids = former.token_ids + more.token_ids
    versions = former.version_of_tokens + more.version_of_tokens
    both_routed = former.routing is not None and more.routing is not None
    return Completion(
        token_ids=ids,
        logprobs=former.logprobs + more.logprobs,
        text=str(tokenizer.decode(ids[:-1] if more.finish_reason == "stop" else ids)),
        finish_reason=more.finish_reason,
        policy_version=more.policy_version,
        draft=former.draft + DraftStats(target_forwards=1) + more.draft,
        routing=torch.cat([former.routing, more.routing]) if both_routed else None,
        versions=versions if len(set(versions)) > 1 else [],
    )

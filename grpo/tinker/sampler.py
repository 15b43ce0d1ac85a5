"""What a sampling client asks: one engine, which takes the weights of one sampler after the other.

Every request is decoded by itself, so that no token and no log-probability depends on what else is asked meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo.endpoint.asked import MOST_STOPS, STOP_CHARACTERS
from grpo.learner import state
from grpo.learner.master_weights import MasterWeights
from grpo.tinker.model import Spec
from grpo.tinker.wire import Refused
from policies import tensor_files
from policies.files.checksums import fault
from policies.logprobs import logprobs_from_hidden
from policies.policy import Policy
from rewards.config.json_file import read_json
from rollout.decoding.engine import Engine
from rollout.faults import RolloutError
from rollout.group import Completion, Prompt
from rollout.sampling import SamplingParams

MOST_SAMPLES = 1024
UNKNOWN = ("topk_prompt_logprobs", "topk_sample_logprobs", "target_prompt_logprobs", "prompt_alt_tokens_k")


@dataclass(frozen=True)
class Asked:
    """A request for samples. `key` is what the noise depends on besides the seed: where it was sent from, unless it
    names a seed of its own."""

    prompt: list[int]
    params: SamplingParams
    key: str
    last: int  # tokens of the prompt whose log-probabilities are asked for


def read(request: Mapping[str, Any], key: str, stop_token_ids: Sequence[int], context: int) -> Asked:
    """Understands a SampleRequest, as JSON, for a policy with this context. Raises Refused for what is not here, and
    for values that are wrong."""
    for name in UNKNOWN:
        if request.get(name):
            raise Refused(f"{name}: not here; the server gives the log-probabilities of what is sampled and prompted")
    prompt = []
    for chunk in request["prompt"]["chunks"]:
        if chunk.get("type", "encoded_text") != "encoded_text":
            raise Refused(f"prompt: a chunk of type {chunk['type']}; this server reads text: send encoded_text")
        prompt += chunk["tokens"]
    if not prompt:
        raise Refused("prompt: it has no token; send at least one")
    if len(prompt) > context:
        raise Refused(f"prompt: it has {len(prompt):,} tokens, and the context is {context:,} tokens; shorten it")
    asked, count = request["sampling_params"], request.get("num_samples", 1)
    if asked.get("top_k", -1) not in (-1, 0) or asked.get("top_p", 1) != 1:
        raise Refused("sampling_params: top_k and top_p would change the distribution that is trained; leave them out")
    if not 1 <= count <= MOST_SAMPLES:
        raise Refused(f"num_samples={count}: use 1 to {MOST_SAMPLES}")
    limit = asked.get("max_tokens")
    if limit is not None and limit < 1:
        raise Refused(f"max_tokens={limit}: use 1 or more, or leave it out to sample to the end of the context")
    stop, seed = asked.get("stop"), asked.get("seed")
    stops = [stop] if isinstance(stop, str) else list(stop or [])
    if len(stops) > MOST_STOPS or any(isinstance(s, str) and len(s) > STOP_CHARACTERS for s in stops):
        raise Refused(f"stop: give at most {MOST_STOPS} texts or tokens, of at most {STOP_CHARACTERS:,} characters")
    texts, ids = tuple(s for s in stops if isinstance(s, str)), tuple(s for s in stops if isinstance(s, int))
    params = SamplingParams(
        group_size=count,
        temperature=asked.get("temperature", 1.0),
        max_completion_tokens=limit or 0,  # 0: to the end of the context
        stop_token_ids=ids if ids or stop == [] else tuple(stop_token_ids),
        stop_strings=texts,
        seed=0 if seed is None else seed,
    )
    last = 0
    if request.get("prompt_logprobs"):
        last = request.get("prompt_logprobs_last_n") or len(prompt) - 1
        if not 0 <= last < max(len(prompt), 2):
            raise Refused(
                f"prompt_logprobs_last_n={last}: use 1 to {len(prompt) - 1}, the prompt's tokens but its first"
            )
    return Asked(prompt, params, key if seed is None else "", last)


def tensors_of(folder: Path, only: Collection[str] | None = None) -> dict[str, Mapping[str, Tensor]]:
    """The tensors that were saved in a folder, or `only` these parts. Raises Refused, which names the file that is not
    as it was written.

    A folder of version 0.2 has no checksums, and passes.
    """
    files = [(file.name, file.stat()) for file in sorted(folder.iterdir())]
    _check(folder, tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in files))
    return tensor_files.read(folder, only)


@lru_cache(maxsize=64)  # folders: a sampler comes back to the same ones in turns
def _check(folder: Path, files: tuple[tuple[str, int, int], ...]) -> None:
    """Compare the files of a folder with their checksums. `files` are their names, sizes and times: as long as these
    are the same, they are not read again."""
    if "files" in read_json(folder / "spec.json") and (why := fault(folder, "spec.json")):
        raise Refused(f"{folder} is damaged: {why}")


@contextmanager
def unmoved(folder: Path) -> Iterator[None]:
    """Raises Refused if saved weights are deleted, or replaced by others, while they are read inside it: what was read
    may be of two saves."""
    before = _identity(folder)
    try:
        yield
    except (FileNotFoundError, Refused):
        if before is not None and _identity(folder) == before:
            raise
    if before is None or _identity(folder) != before:
        raise Refused(f"weights {folder.name!r} were deleted or replaced while they were read; ask again")


def _identity(folder: Path) -> tuple[int, int] | None:
    """Tells a folder from another one of its name; None where there is none. Its files are written before it gets its
    name."""
    try:
        stat = folder.stat()
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_mtime_ns


def spec_in(folder: Path) -> Spec:
    """What the policy is that is kept in a folder."""
    content = read_json(folder / "spec.json")
    return Spec(**{field.name: content[field.name] for field in fields(Spec)})


class Sampler:
    """One engine, with weights of its own. `of` is which sampler's it holds."""

    def __init__(self, base: Policy, dtype: torch.dtype) -> None:
        self.base, self.of, self.count = base, "", 0
        self.engine = Engine(base.merged(), dtype)

    def hold_weights(self, name: str, folder: Path | None) -> None:
        """Hold the weights of this sampler: those in `folder`, or the base's."""
        if name == self.of:
            return
        policy = self.base
        if folder is not None:
            policy = spec_in(folder).build(self.base)
            state.put_weights(tensors_of(folder, {"policy"})["policy"], policy, MasterWeights(policy))
        self.of, self.count = "", self.count + 1  # where it fails, it holds nobody's
        self.engine.sync_weights(policy.weights(), self.count)
        self.of = name

    def sample(self, asked: Asked) -> tuple[list[Completion], list[float] | None]:
        """The samples, and the log-probabilities of the prompt's tokens where they are asked for, NaN for others."""
        context = self.engine.policy.max_length
        room = context - len(asked.prompt)
        limit = asked.params.max_completion_tokens or room
        if room < limit or room < 1:
            raise Refused(
                f"the context is {context} tokens: the prompt has {len(asked.prompt)}, and max_tokens is {limit}"
            )
        prompt = Prompt(asked.key, "", asked.prompt)
        params = replace(asked.params, max_completion_tokens=limit)
        try:
            [group] = self.engine.sample([prompt], params)
        except (RolloutError, ValueError) as error:
            raise Refused(str(error)) from None
        return group.completions, self._of_prompt(asked.prompt, asked.last) if asked.last else None

    @torch.inference_mode()
    def _of_prompt(self, token_ids: list[int], last: int) -> list[float]:
        policy = self.engine.policy
        ids = torch.tensor([token_ids], device=policy.device)
        positions = torch.arange(len(token_ids), device=policy.device)[None]
        hidden = policy.hidden(ids, positions, torch.zeros_like(ids))[0]
        logprobs: Tensor
        logprobs, _ = logprobs_from_hidden(hidden[-last - 1 : -1], policy.output, ids[0, -last:])
        return [math.nan] * (len(token_ids) - last) + logprobs.tolist()

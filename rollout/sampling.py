"""How a token is chosen: by keyed noise, so that given the logits it depends on its key alone (contract 4).

token = argmax_v (logit_v / T + gumbel(key, position, v)): the Gumbel-max trick draws from softmax(logit / T) exactly,
and a draft that uses the same noise on its own logits often agrees with the trunk. The noise is a hash of
(key, position, v) and no stream, so drafting, batching and retries cannot shift it.

Axes: N rows (or row and position), V vocabulary, B blocks of BLOCK neighbouring tokens, K tokens that may be drafted.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

FULL_ROW = 1024  # vocabularies up to this size take a noise for every token
Chosen: TypeAlias = Tensor | slice  # which rows
LOWEST_TEMPERATURE = 1e-6  # besides 0; logits that are divided by less leave the range of float32
BLOCK = 256  # of larger ones a block of this many tokens is drawn first, then a token inside it
IN_CACHE = 1 << 20  # logits that a CPU chooses from at a time: 4 MB in float32 stay in the cache of a core
WORD = 0xFFFFFFFF


@dataclass(frozen=True)
class Copies:
    """The kinds, `none`, `int8` or `int4`, of what is sampled by and of what drafts are made by; see
    policies/decoding/quantized.py."""

    trunk: str = "none"
    drafts: str = "none"


PLAIN = Copies()


@dataclass(frozen=True)
class EnvironmentSpec:
    """The tools of a run and their environments, see rollout/environments/protocol.py.

    `tools` are functions, `path.py:function`. `environments` are pairs of a name and `path.py:Class`; a single one that
    serves all prompts has the name "". `max_turns`: of the policy in one episode. The calls of a turn may take
    `timeout_s`, in one of `workers` processes, each of which may hold `memory_mb` MiB of data.
    """

    tools: tuple[str, ...] = ()
    environments: tuple[tuple[str, str], ...] = ()
    max_turns: int = 8
    timeout_s: float = 10.0
    memory_mb: int | None = None
    workers: int = 1


@dataclass(frozen=True)
class SamplingParams:
    """How completions are sampled. A `temperature` of 0 is greedy. `step` and `draw` are part of every noise key, so a
    new step has new noise.

    `draft_tokens` None lets the depth controller choose before every forward. `accept="margin"` is lossy: it takes a
    draft unverified where its two best log-probabilities differ by more than `margin`; it is never used in training
    (contract 3). `start` counts the tokens that the completions have already, as the end of their prompts: the noise
    goes on after them. `record_routing` records the experts and attention heads of every token, for a learner that
    replays them. `stop_strings` end a completion with the token that completes one of them, and its text before the
    string. They are never used in training, where the text is that of the tokens. With an `environment` a completion is
    an episode of several turns, and `max_completion_tokens` limits all that is sampled and written in it. No token
    depends on `compiled`, by which graphs decode few rows, nor on `head_accepted` (see rollout/drafts/depth.py).
    """

    group_size: int = 8
    temperature: float = 1.0
    max_completion_tokens: int = 256
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0
    draft_tokens: int | None = 0
    step: int = 0
    draw: int = 0
    start: int = 0
    accept: Literal["exact", "margin"] = "exact"
    margin: float = 2.0
    record_routing: bool = False
    stop_strings: tuple[str, ...] = ()
    environment: EnvironmentSpec | None = None
    compiled: bool = False
    head_accepted: tuple[float, ...] = ()

    def at(self, step: int, draw: int = 0) -> SamplingParams:
        return replace(self, step=step, draw=draw)

    def check(self) -> None:
        """Raises ValueError, which names the field, its value and what would work."""
        if self.group_size < 1:
            raise ValueError(f"rollout.group_size={self.group_size}: sample at least 1 completion per prompt")
        if self.temperature and not LOWEST_TEMPERATURE <= self.temperature < float("inf"):
            raise ValueError(
                f"rollout.temperature={self.temperature}: use 0 (greedy) or a positive number, {LOWEST_TEMPERATURE:g} "
                "or more"
            )
        if self.max_completion_tokens < 1:
            raise ValueError(f"rollout.max_completion_tokens={self.max_completion_tokens}: use 1 or more")
        if self.draft_tokens is not None and self.draft_tokens < 0:
            raise ValueError(f"rollout.draft_tokens={self.draft_tokens}: use 0 (no drafts) or more")
        if self.accept not in ("exact", "margin"):
            raise ValueError(f"accept={self.accept!r}: use exact or margin")
        if isinstance(self.stop_strings, str):  # whose letters would each end a completion
            raise ValueError(f"stop={self.stop_strings!r}: give a list of texts")
        if "" in self.stop_strings:
            raise ValueError(f"stop={list(self.stop_strings)}: an empty text would end every completion; leave it out")
        if not self.margin >= 0:
            raise ValueError(f"margin={self.margin}: use 0 or more nats")


def row_key(params: SamplingParams, prompt_id: str, sample: int) -> tuple[int, int]:
    """Two 32-bit words from (seed, step, draw, prompt, sample).

    >>> row_key(SamplingParams(seed=1), "a", 0) == row_key(SamplingParams(seed=1, draft_tokens=4), "a", 0)
    True
    """
    text = f"{params.seed}/{params.step}/{params.draw}/{sample}/{prompt_id}".encode()
    words = hashlib.blake2b(text, digest_size=8).digest()
    return int.from_bytes(words[:4], "little", signed=True), int.from_bytes(words[4:], "little", signed=True)


def _mix(x: Tensor) -> Tensor:
    """A bijective hash of int32 with full avalanche (multiply and xor-shift; wraps on overflow), in place."""
    x ^= (x >> 16) & 0xFFFF
    x *= 0x21F0AAAD
    x ^= (x >> 15) & 0x1FFFF
    x *= 0x735A2D97
    x ^= (x >> 15) & 0x1FFFF
    return x


class Noise:
    """The noise of rows at their positions. One object serves the drafts and the verification of the same positions.

    `keys_N2` [..., 2] and `positions` [...] are broadcast against each other; `positions` counts from the completion's
    first token. Where noise and choice are one operator (see `at_once`), it is drawn only there: `tensors` are the keys
    and positions then, and else two words of each row and the noise of its tokens or blocks.
    """

    def __init__(self, keys_N2: Tensor, positions: Tensor, vocabulary: int, *, waits: bool | None = None) -> None:
        place = positions.to(torch.int32)
        self.vocabulary, self.flat = vocabulary, vocabulary <= FULL_ROW
        if at_once(place.device) if waits is None else waits:
            self.tensors: tuple[Tensor, ...] = keys_N2.expand(*place.shape, 2), place
            return
        first = _mix(keys_N2[..., 0] + _mix(place * -1640531527))
        self.tensors = first, _mix(keys_N2[..., 1] ^ first)
        if self.flat:
            table = self.gumbel(torch.arange(vocabulary, device=place.device))
        else:  # of the blocks, whose ids are negative and thus no token's
            table = self.gumbel(-1 - torch.arange(-(-vocabulary // BLOCK), device=place.device))
        self.tensors += (table,)

    @property
    def table(self) -> Tensor:
        return self.tensors[2]

    def uniform(self, ids: Tensor) -> Tensor:
        """Keyed uniforms in (0, 1), 23 bits each, one for each of `ids` [..., K] or [K] in every row."""
        first, second = self.tensors[:2]
        x = _mix(ids.to(torch.int32) * 0x3C6EF372 + first[..., None])
        x += second[..., None]
        x = _mix(x)
        # A float32 holds 23 bits and a half exactly; with 24 the largest would round to 1, whose noise is infinite.
        return (((x >> 9) & 0x7FFFFF).float() + 0.5) * 2.0**-23

    def gumbel(self, ids: Tensor) -> Tensor:
        return self.uniform(ids).log_().neg_().log_().neg_()

    def at(self, place: int) -> Noise:
        """The noise of one of the places that each row has: [R, S, ...] -> [R, ...]."""
        return self._view(lambda x: x[:, place])

    def of(self, rows: Chosen) -> Noise:
        """The noise of some rows: [N, ...] -> [n, ...]."""
        return self._view(lambda x: x[rows])

    def flatten(self) -> Noise:
        """The noise as rows alone: [R, S, ...] -> [R · S, ...]."""
        return self._view(lambda x: x.flatten(0, 1))

    def _view(self, view: Callable[[Tensor], Tensor]) -> Noise:
        seen = copy.copy(self)
        seen.tensors = tuple(map(view, self.tensors))
        return seen


class DraftVocabulary:
    """The tokens that may be drafted, ascending, and their places in the blocks of the whole vocabulary. Drafts are
    cheaper without rare tokens, and no sampled token changes: the trunk gives those that cannot be drafted."""

    def __init__(self, ids_K: Tensor, vocabulary: int) -> None:
        self.ids = ids_K
        self.block_K = ids_K // BLOCK
        blocks = -(-vocabulary // BLOCK)
        counts = torch.bincount(self.block_K, minlength=blocks)
        within = torch.arange(len(ids_K), device=ids_K.device) - (counts.cumsum(0) - counts)[self.block_K]
        self.named = F.pad(ids_K, (0, 1))  # the id of every column; column K is an empty place, whose id has no effect
        # [B, widest]: the columns of each block.
        self.members = ids_K.new_full((blocks, int(counts.max())), len(ids_K))
        self.members[self.block_K, within] = torch.arange(len(ids_K), device=ids_K.device)

    @property
    def tensors(self) -> list[Tensor]:
        return [self.ids, self.block_K, self.named, self.members]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> DraftVocabulary:
        """The inverse of `tensors`."""
        vocabulary = cls.__new__(cls)
        vocabulary.ids, vocabulary.block_K, vocabulary.named, vocabulary.members = tensors
        return vocabulary


def by_temperature(temperature_N: Tensor, make: Callable[[float, Chosen], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Calls `make` for the rows of each temperature, once for each; the results [N] are in row order.

    A row thus gets the bits that it would get in a batch of its own temperature. `temperature_N` is float64, since a
    temperature such as 0.7 would be another one in float32.

    >>> by_temperature(torch.tensor([0.0, 1.0, 0.0]).double(), lambda t, rows: (torch.full((3,), t)[rows],))
    (tensor([0., 1., 0.]),)
    """
    different = temperature_N.unique().tolist()
    if len(different) == 1:
        return make(different[0], slice(None))
    rows = [(temperature_N == temperature).nonzero()[:, 0] for temperature in different]
    results = zip(*map(make, different, rows), strict=True)
    order = torch.cat(rows).argsort()
    return tuple(torch.cat(parts)[order] for parts in results)


def choose(
    logits_NV: Tensor, temperature: float | Tensor, noise: Noise, vocabulary: DraftVocabulary | None = None
) -> tuple[Tensor, Tensor]:
    """Sampled token ids [N] and their log-probabilities [N] under softmax(logits / T); greedy ones are scored at T = 1.

    From a large vocabulary a block is drawn and then a token inside it, each as the largest perturbed log-probability:
    P(block) · P(token | block) = P(token), with a hundredth of the noise. With a draft `vocabulary` the logits are
    those of its K tokens, and the noise is the same. `temperature` [N], float64, gives every row its own.
    """
    if isinstance(temperature, Tensor):
        return by_temperature(temperature, lambda t, r: choose(logits_NV[r], t, noise.of(r), vocabulary))
    if at_once(logits_NV.device):
        drafted = [] if vocabulary is None else vocabulary.tensors
        return choose_at_once(logits_NV, *noise.tensors, temperature, noise.vocabulary, drafted)
    if torch.compiler.is_exporting():  # of a graph for any number of rows
        return _choose(logits_NV, temperature, noise, vocabulary)
    few = max(1, IN_CACHE // logits_NV.shape[1])
    parts = [
        _choose(logits, temperature, noise.of(slice(first, first + few)), vocabulary)
        for first, logits in zip(range(0, max(1, len(logits_NV)), few), logits_NV.split(few), strict=True)
    ]
    ids, logprobs = zip(*parts, strict=True)
    return torch.cat(ids), torch.cat(logprobs)


def choose_by_keys(
    logits_NV: Tensor, keys_N2: Tensor, positions_N: Tensor, temperature: float, vocabulary: int, drafted: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Chooses as `choose`, with the noise of these keys at these positions, for a `vocabulary` of so many tokens.
    `drafted` are the tensors of a `DraftVocabulary`, or none."""
    noise = Noise(keys_N2, positions_N, vocabulary, waits=False)
    return _choose(logits_NV, temperature, noise, DraftVocabulary.of(drafted) if drafted else None)


def at_once(device: torch.device) -> bool:
    """Whether noise and choice are one operator there: every call of a kernel costs the host time.

    A CPU calls the plain functions: there nothing is saved, and the noise of a block is shared by its drafts and their
    verification.
    """
    return device.type != "cpu"


@cache
def _function(kind: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The function that the operator calls. On CUDA it is compiled, so that a round calls few kernels.

    No GPU has run this yet.
    """
    from torch.utils._triton import has_triton

    if kind == "cuda" and has_triton():
        return torch.compile(choose_by_keys, dynamic=True)
    return choose_by_keys


@torch.library.custom_op("quartet::choose", mutates_args=())
def choose_at_once(
    logits_NV: Tensor, keys_N2: Tensor, positions_N: Tensor, temperature: float, vocabulary: int, drafted: list[Tensor]
) -> tuple[Tensor, Tensor]:
    choose = _function(logits_NV.device.type)
    return choose(logits_NV, keys_N2, positions_N, temperature, vocabulary, drafted)


def _choose(
    logits_NV: Tensor, temperature: float, noise: Noise, vocabulary: DraftVocabulary | None
) -> tuple[Tensor, Tensor]:
    logits_NV = _scaled(logits_NV, temperature)
    if temperature == 0 or noise.flat:
        logits = logits_NV.float()
        best = _best_of_all(logits, temperature, noise, vocabulary)
        logprobs = logits.gather(1, best[:, None])[:, 0] - logits.logsumexp(-1)
        return (best if vocabulary is None else vocabulary.ids[best]), logprobs
    p_NV = logits_NV.float().softmax(-1)  # not softmax(dtype=...), which is six times slower on a CPU
    rows = torch.arange(p_NV.shape[0], device=p_NV.device)
    if vocabulary is None:
        missing = -p_NV.shape[1] % BLOCK
        p_NBM = (F.pad(p_NV, (0, missing)) if missing else p_NV).view(p_NV.shape[0], -1, BLOCK)
        block = (p_NBM.sum(-1).log() + noise.table).argmax(-1)
        p = p_NBM[rows, block]
        ids = block[:, None] * BLOCK + torch.arange(BLOCK, device=block.device)
    else:
        mass = torch.zeros_like(noise.table).index_add_(1, vocabulary.block_K, p_NV)
        members = vocabulary.members[(mass.log() + noise.table).argmax(-1)]
        p, ids = F.pad(p_NV, (0, 1)).gather(1, members), vocabulary.named[members]
    best = (p.log() + noise.gumbel(ids)).argmax(-1)
    return ids[rows, best], p[rows, best].log()


def pick(
    logits_NV: Tensor, temperature: float | Tensor, noise: Noise, vocabulary: DraftVocabulary | None = None
) -> Tensor:
    """The tokens of `choose` without their log-probabilities, for drafts."""
    if isinstance(temperature, Tensor):
        return by_temperature(temperature, lambda t, r: (pick(logits_NV[r], t, noise.of(r), vocabulary),))[0]
    if (temperature and not noise.flat) or at_once(logits_NV.device):
        return choose(logits_NV, temperature, noise, vocabulary)[0]
    best = _best_of_all(_scaled(logits_NV, temperature).float(), temperature, noise, vocabulary)
    return best if vocabulary is None else vocabulary.ids[best]


def _scaled(logits_NV: Tensor, temperature: float) -> Tensor:
    return logits_NV if temperature in (0, 1) else logits_NV.float() / temperature


def _best_of_all(logits_NV: Tensor, temperature: float, noise: Noise, vocabulary: DraftVocabulary | None) -> Tensor:
    """The column [N] of the largest logit, which is perturbed unless sampling is greedy."""
    if temperature:
        logits_NV = logits_NV + (noise.table if vocabulary is None else noise.table[:, vocabulary.ids])
    return logits_NV.argmax(-1)


def logprobs_of(logits_NV: Tensor, tokens_N: Tensor, temperature: float | Tensor) -> Tensor:
    """Log-probability of given tokens [N] under softmax(logits / T); greedy ones are scored at T = 1."""
    if isinstance(temperature, Tensor):
        return by_temperature(temperature, lambda t, r: (logprobs_of(logits_NV[r], tokens_N[r], t),))[0]
    scaled = logits_NV.float() / (temperature or 1.0)
    return scaled.gather(1, tokens_N[:, None])[:, 0] - scaled.logsumexp(-1)

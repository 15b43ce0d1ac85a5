"""Does a model that we did not write compute what we rely on? Its own forward, row by row, tells."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from grpo.learner.batch import collate
from grpo.learner.row import PackedRow, Sample
from policies.attention import attending_by
from policies.cut import cut_model, has_windows
from policies.layout import is_language_model
from policies.lm_head import last_states
from policies.logprobs import shifted_logprobs, token_logprobs
from policies.paths import ROWS, SAMPLERS, STATES, Paths
from policies.policy import Policy, PolicyError
from policies.presets import small_tokenizer
from rollout.group import Prompt
from rollout.sampling import SamplingParams

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5}  # of a log-probability; what is really wrong is off by more
MEDIAN_FROM = 0.1  # from this tolerance on, half of the tokens decide
EXACT = 1e-4  # the same of a small model with random weights in float32
STOCK = 3e-3  # by transformers' own cache, which rounds otherwise than its forward (Nemotron-H)
PROMPTS, TOKENS = (5, 21), 8  # tokens of a prompt, and of a completion
DIGITS, TOKENS_OF_BYTES = "2 + 2 = 4\n", 272
GROUPS = (2, 6)  # completions of a row: few, which a mask reads faster, and many, where blocks pay (see Packing.pays)
READERS = {"states": "the LM head", "sampler": "the sampler", "rows": "the learner"}
FASTEST = Paths()
OF_DECODER = "our cache and prompts that are read once need the states that the decoder gives"
Scores = Callable[[], tuple[Tensor, Tensor]]  # log-probabilities by a path, and by the model's own forward


def check_agreement(policy: Policy) -> None:
    """Sampler and learner must give the log-probabilities of the model's own forward of each row alone.

    Sets `policy.paths` to the fastest paths that do. Where the rows tried are shorter than a window, or the precision
    is too low to tell, they are chosen on a small model of the same architecture first, see `fastest_of_cut`. Raises
    PolicyError naming the model type where none does.
    """
    dtype, fastest = next(policy.parameters()).dtype, FASTEST
    refuse_form(policy)
    if dtype != torch.float32 or has_windows(policy.config):
        fastest = fastest_of_cut(policy)
    choose_paths(policy, TOLERANCE[dtype], fastest)


def refuse_form(policy: Policy) -> None:
    """Raises PolicyError for a model that cannot be trained, as far as it shows without weights."""
    if policy.trunk.get_output_embeddings() is None:
        raise _refusal(policy.config.model_type, "it has no LM head")
    if not is_language_model(policy.config):
        raise _refusal(policy.config.model_type, "transformers builds its language model with the rest alone")


_OF_CUT: dict[str, Paths] = {}  # by configuration, attention and device
UNTRIED = "no small model of this type can be built, and rows that are tried are shorter than its windows"


def fastest_of_cut(policy: Policy) -> Paths:
    """The fastest paths that agree on a small model of this architecture in float32, whose windows are short. Where
    there is none, those of transformers where there are windows, since nobody has tried ours beyond them."""
    shape, device = policy.config, policy.device
    key = f"{shape.to_dict()} {policy.own_attention} {device}"
    if key not in _OF_CUT:
        try:
            _OF_CUT[key] = paths_of_cut(policy, device)
        except (ValueError, RuntimeError):  # it cannot be built or held, or every path rounds too much
            _OF_CUT[key] = Paths("apart", "alone", slower=(UNTRIED,)) if has_windows(shape) else FASTEST
    return _OF_CUT[key]


def paths_of_cut(policy: Policy, device: torch.device, tolerance: float = EXACT) -> Paths:
    """The fastest paths that agree on a small model of this architecture. Raises PolicyError where none does, and
    ValueError or RuntimeError where there is no small model. No weight of the policy is read."""
    tokenizer = policy.tokenizer or small_tokenizer([DIGITS], TOKENS_OF_BYTES)
    small = Policy(cut_model(policy.config, attention=policy.own_attention).to(device), None, tokenizer)
    choose_paths(small, tolerance)
    return small.paths


def planned_paths(policy: Policy, device: torch.device) -> str:
    """Return in words how a policy without weights will be sampled and read, and why not faster. Raises PolicyError if
    a small model of its architecture is refused, also with the tolerance of the lowest precision."""
    if policy.backend == "native":
        return f"sampled by our engine; {ROWS['packed']}"
    refuse_form(policy)
    try:
        return paths_of_cut(policy, device).with_reasons
    except PolicyError as error:
        paths_of_cut(policy, device, TOLERANCE[torch.bfloat16])
        return f"chosen when the weights are loaded: with random ones {error}"
    except (ValueError, RuntimeError) as error:
        return f"chosen when the weights are loaded: {error}"


@torch.no_grad()
def choose_paths(policy: Policy, tolerance: float, fastest: Paths = FASTEST) -> None:
    """Sets `policy.paths` to the fastest paths whose log-probabilities are within `tolerance`, none of them faster than
    `fastest`. Raises PolicyError where none is."""
    policy.paths = replace(policy.paths, slower=fastest.slower)
    _choose(policy, "states", STATES, lambda: by_lm_head(policy), tolerance, fastest.states)
    if policy.paths.states == "head":
        policy.paths = replace(policy.paths, slower=(*policy.paths.slower, OF_DECODER))
        fastest = Paths("joined" if fastest.sampler == "own" else fastest.sampler, "alone")
    _choose(policy, "sampler", SAMPLERS, lambda: by_sampler(policy), tolerance, fastest.sampler)
    _choose(policy, "rows", ROWS, lambda: by_learner(policy), tolerance, fastest.rows)


def _choose(policy: Policy, name: str, words: Mapping[Any, str], scores: Scores, tolerance: float, first: str) -> None:
    """The paths before `first` are not tried."""
    faults: dict[str, str] = {}  # by the words of a path
    paths = list(words)
    for path in paths[paths.index(first) :]:
        policy.paths = replace(policy.paths, **{name: path})
        try:
            by_path, own = scores()
        except Exception as error:  # whatever a model that nobody here wrote may raise
            faults[words[path]] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            continue
        difference = _difference(by_path, own, tolerance)
        if difference <= (max(tolerance, STOCK) if path in ("joined", "apart") else tolerance):
            slower = [f"not {faster!r}: {fault}" for faster, fault in faults.items()]
            policy.paths = replace(policy.paths, slower=(*policy.paths.slower, *slower))
            return
        faults[words[path]] = f"log-probabilities differ from those of its own forward by {difference:.1g}"
    last = words[paths[-1]]
    raise _refusal(
        policy.config.model_type, f"{READERS[name]} fails in every way, and at last ({last}): {faults[last]}"
    )


def _difference(by_path: Tensor, own: Tensor, tolerance: float) -> float:
    """The largest difference of the log-probabilities, or in low precision the median.

    Rounded to bfloat16, an improbable token is off by anything: SmolLM2-135M gives one -24 by one path and -32 by
    another, where the median is .06. A path that is wrong changes every token, and which one is right in each place a
    small model in float32 has told before.
    """
    differences = (by_path - own).abs()
    if tolerance >= MEDIAN_FROM:
        return differences.median().item()
    return differences.max().item()


def _refusal(kind: str, reason: str) -> PolicyError:
    return PolicyError(
        f"a model of type {kind!r} cannot be trained here: {reason}. Llama, Qwen, Mistral, OLMo and their kin can; "
        "so can a DeepSeek-V3 model"
    )


def by_sampler(policy: Policy) -> tuple[Tensor, Tensor]:
    """Log-probabilities of tokens that the engine has sampled: by it, and by the model's own forward."""
    from rollout.decoding.engine import Engine

    params = SamplingParams(group_size=2, max_completion_tokens=TOKENS)
    prompts = [Prompt(f"agreement/{n}", "", token_ids) for n, token_ids in enumerate(tried_prompts(policy))]
    groups = Engine(policy, next(policy.parameters()).dtype).sample(prompts, params)
    pairs = [(group.prompt.token_ids, completion) for group in groups for completion in group.completions]
    sampled = torch.tensor([value for _, completion in pairs for value in completion.logprobs])
    return sampled, torch.cat([own_logprobs(policy, prompt, completion.token_ids) for prompt, completion in pairs])


def by_lm_head(policy: Policy) -> tuple[Tensor, Tensor]:
    """Log-probabilities by the LM head, and by the model's own forward."""
    prompt, completion = tried_prompts(policy)
    row = torch.tensor([prompt + completion], device=policy.device)
    with attending_by(policy.config, policy.own_attention):
        states, _ = last_states(policy.trunk, policy.paths.states, input_ids=row, use_cache=False)
    by_states = shifted_logprobs(policy.output.logits(states), row)[0, len(prompt) - 1 :]
    return by_states.cpu(), own_logprobs(policy, prompt, completion)


def by_learner(policy: Policy, together: bool = False) -> tuple[Tensor, Tensor]:
    """Log-probabilities of given tokens: by the learner's rows, and by the model's own forward. `together`: the shorter
    row is padded to the longer one."""
    vocabulary, rows, packed, own = len(policy.lm_head), [], [], []
    for prompt, count in zip(tried_prompts(policy), GROUPS, strict=True):
        completions = [[(7 * c + 3 * t) % (vocabulary - 2) + 2 for t in range(TOKENS)] for c in range(count)]
        rows.append(PackedRow(prompt, [Sample(c, ids) for c, ids in enumerate(completions)]))
        own += [own_logprobs(policy, prompt, ids) for ids in completions]
    for batch in [rows] if together else [[row] for row in rows]:
        mini = collate(batch, policy.device)
        hidden = policy.hidden(mini.token_ids, mini.position_ids, mini.segment)
        preceding = hidden.gather(1, mini.before[..., None].expand_as(hidden))[mini.scored]
        packed.append(token_logprobs(policy.output.logits(preceding), mini.token_ids[mini.scored]).cpu())
    return torch.cat(packed), torch.cat(own)


def tried_prompts(policy: Policy) -> list[list[int]]:
    """Token ids of a short and of a longer prompt, which is no longer than the context allows."""
    short, longer = PROMPTS
    return [list(range(2, 2 + length)) for length in (short, min(longer, policy.max_length - TOKENS - short))]


def own_logprobs(policy: Policy, prompt: list[int], completion: list[int]) -> Tensor:
    row = torch.tensor([prompt + completion], device=policy.device)
    with attending_by(policy.config, policy.own_attention):
        logits = policy.trunk(input_ids=row, use_cache=False).logits
    return shifted_logprobs(logits, row)[0, len(prompt) - 1 :].cpu()

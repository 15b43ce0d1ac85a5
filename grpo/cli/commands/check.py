"""`quartet check`: does an architecture train right, by transformers itself, by quartet and by TRL?

It is tried on a small model with random weights, see `policies.cut`. What differs from the model's own forward of each
row alone is wrong, and every wrong number comes with what to do about it.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from grpo.source.agreement import EXACT, STOCK, by_learner, by_lm_head, by_sampler, choose_paths
from grpo.source.policy_source import find_policy, shape_of
from policies import lora
from policies.checkpoint import check_weights, own_code
from policies.contradictions import why_refused
from policies.cut import CHOSEN, WINDOW, cut_model, has_windows, quiet
from policies.layout import PolicyError, WeightFiles
from policies.lm_head import last_states
from policies.policy import Policy, checkpoint_layers, read_tokenizer
from policies.presets import PRESETS, small_tokenizer
from policies.routing.routers import routers
from policies.sharding import routed_experts
from rewards.finding import Finding, Report, found
from rewards.kinds import ERROR, KINDS, NOTE
from rollout.backends.stock import CACHES
from rollout.decoding.engine import Engine
from rollout.environments.thoughts import dropping
from rollout.group import Prompt
from rollout.sampling import SamplingParams

if TYPE_CHECKING:
    from trl import GRPOTrainer

TRANSFORMERS, OURS, TRL = "transformers", "quartet", "TRL"
PROMPT, DECODED = 21, 8  # tokens; windows, chunks and blocks of the small model are shorter
LENGTHS = (9, 13, 29)  # of rows that are padded or packed together
WIDE = 4096  # a window that no row of these leaves
SLIDING = ("sliding_window", "sliding_window_size", "attention_chunk_size")
TEXT = "X  = 1 ;\n\tif a : b , c .\n\n  é 漢字 🙂 don't \n"  # spaces that some tokenizers lose
SAID = "It is  4.\n\n    So: 4"
THOUGHT = "adding both"
TRIMS = "trims what was said"
READABLE = "keeps turns", "drops earlier thoughts", TRIMS  # so the end of a turn, if there is one, is found
COMPARED = (
    *("the same twice", "causal", "prefill + decode = whole forward", "prompt in pieces", "rows in one cache"),
    *("batch invariance", "left = right padding", "decode beside padding", "packed = alone"),
)
OTHER_KINDS = {"template": "chat-template", "weights": "weight-files", "quartet's paths": "paths"}


@dataclass
class Row:
    """What was asked, and by column a number or a word. `wrong` are the columns in which it is wrong, `note` says what
    is worth knowing all the same."""

    name: str
    values: dict[str, float | str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    note: str = ""

    def compare(self, column: str, difference: Callable[[], float], most: float = STOCK) -> None:
        """What `difference` gives is wrong above `most`, and so is a failure."""
        try:
            value = difference()
            self.say(column, value if value == value else "not a number", wrong=not value <= most)
        except Exception as error:  # whatever a model that nobody here wrote may raise
            self.say(column, f"{type(error).__name__}: {error}"[:200], wrong=True)

    def say(self, column: str, word: float | str, wrong: bool = False) -> None:
        self.values[column] = word
        if wrong:
            self.wrong.append(column)

    @property
    def kind(self) -> str:
        """Its kind in the table of findings, which has other ones of three names.

        >>> Row("packed = alone").kind
        'packed-alone'
        """
        return OTHER_KINDS.get(self.name) or re.sub("[^a-z]+", "-", self.name.lower())

    @property
    def finding(self) -> Finding | None:
        """What is wrong, or worth knowing all the same."""
        if not self.wrong and not self.note:
            return None
        columns = self.wrong or list(self.values)
        what = f"{self.name}: {', '.join(f'{self.cell(column)} in {column}' for column in columns)}"
        words = {"change": self.note} if self.note else {}
        return found(self.kind, what, severity=ERROR if self.wrong else NOTE, **words)

    def cell(self, column: str) -> str:
        value = self.values.get(column, "")
        text = f"{value:.0e}" if isinstance(value, float) else value
        return f"{text}  WRONG" if column in self.wrong else text


def check(model: str, layers: int = 1) -> list[Row]:
    """What is right and what is wrong with a preset, a folder, a hub id or a type of transformers, such as `qwen3_5`.

    Raises PolicyError for what is none of these, and where no small model can be built.
    """
    shape, source = _configuration(model)
    try:
        rows = [*examine(shape, layers), reach_of_lora(shape)]
    except ValueError as error:
        raise PolicyError(f"model={model!r}: {error}; name a folder or a hub id whose config.json is whole") from error
    if source is None or source in PRESETS:
        return rows  # nobody has given it a tokenizer
    if words := own_code(source):
        rows.append(Row("own code", {TRANSFORMERS: "never run"}, note=words))
    if any(Path(source).glob("*.safetensors")):
        rows.append(_files(Path(source), shape))
    try:
        tokenizer = read_tokenizer(source)
        if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
            raise ValueError("its folder has none")  # and then transformers makes one of special tokens alone
    except (OSError, ValueError) as error:
        rows.append(Row("template"))
        rows[-1].say(TRANSFORMERS, f"no tokenizer: {error}"[:200])
        return rows
    text = shape.get_text_config(decoder=True)
    eos = getattr(text, "eos_token_id", None)
    with suppress(OSError, ValueError):
        eos = GenerationConfig.from_pretrained(source).eos_token_id or eos
    stops = eos if isinstance(eos, list) else [] if eos is None else [eos]
    return [*rows, *examine_text(tokenizer, stops, getattr(text, "vocab_size", None))]


def _files(folder: Path, shape: PretrainedConfig) -> Row:
    """Whether the weights of a folder are those of its configuration."""
    result = Row("weights")
    try:
        check_weights(WeightFiles(folder), shape)
        result.say(OURS, "as config.json describes them")
    except PolicyError as error:
        result.say(OURS, "refused", wrong=True)
        result.note = str(error)
    return result


def _configuration(model: str) -> tuple[PretrainedConfig, str | None]:
    if model in CONFIG_MAPPING and not Path(model).exists():
        if model not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            raise PolicyError(f"model={model!r}: transformers has no causal language model of this type; name another")
        if why := why_refused(model):
            raise PolicyError(f"model={model!r}: {why}")
        with quiet():
            return CONFIG_MAPPING[model](), None
    try:
        source = find_policy(model, read=False)
    except PolicyError as error:
        near = difflib.get_close_matches(model, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, n=1)
        meant = f"; did you mean the type {near[0]!r} of transformers?" if near else ""
        raise PolicyError(f"{error}{meant}") from error
    return shape_of(source), source.base


def examine(shape: PretrainedConfig, layers: int = 1) -> list[Row]:
    """The rows of the table that a small model of this configuration gives."""
    model = cut_model(shape, layers)
    policy = Policy(copy.deepcopy(model), None, small_tokenizer(["2 + 2 = 4\n"], 272))
    vocabulary = model.get_input_embeddings().weight.shape[0]
    rows = [
        torch.tensor([(37 * t * t + 11 * t + 5 * n) % (vocabulary - 12) + 2 for t in range(LENGTHS[n])])
        for n in range(3)
    ]
    with quiet(), torch.no_grad():
        paths = Row("quartet's paths")
        count = sum(parameter.numel() for parameter in model.parameters())
        paths.say(TRANSFORMERS, f"{type(model).__name__}, {count / 1e6:.1f} M weights")
        try:
            if policy.backend == "transformers":
                choose_paths(policy, EXACT)
            paths.say(OURS, str(policy.paths))
            paths.note = "; ".join(policy.paths.slower)
        except PolicyError as error:
            paths.say(OURS, "refused", wrong=True)
            paths.note = str(error)
        return [
            paths,
            *_differences(model, policy, rows),
            *_short_steps(model, policy, rows[-1]),
            *_windows(model, rows[-1]),
            *_router(model, rows[-1]),
            _checkpointing(model, policy, rows[-1]),
            _lm_head(model, policy, rows[-1]),
        ]


def _differences(model: PreTrainedModel, policy: Policy, rows: Sequence[Tensor]) -> list[Row]:
    """Whether log-probabilities are those of each row alone, whatever it is read with."""
    result = [Row(name) for name in COMPARED]
    twice, causal, decoded, pieces, shared, batch, padded, beside, packed = result
    long = rows[-1]
    twice.compare(TRANSFORMERS, lambda: _apart(_alone(model, long), _alone(model, long)))
    causal.compare(
        TRANSFORMERS, lambda: max(_apart(_alone(model, long[:n]), _alone(model, long)[:n]) for n in (5, 12, 20))
    )
    decoded.compare(TRANSFORMERS, lambda: _best(model, partial(_decoded, model, [long], "")))
    decoded.compare(OURS, lambda: _apart(*by_sampler(policy)))
    pieces.compare(TRANSFORMERS, lambda: _best(model, partial(_decoded, model, [long], "in pieces")))
    others = torch.stack([long, long.flip(0), long.roll(3)])
    shared.compare(TRANSFORMERS, lambda: _best(model, partial(_decoded, model, list(others), "reordered")))
    batch.compare(
        TRANSFORMERS, lambda: _apart(_logprobs(model, others), torch.stack([_alone(model, row) for row in others]))
    )
    batch.compare(OURS, lambda: _beside_others(policy, rows))
    padded.compare(
        TRANSFORMERS, lambda: max(_best(model, partial(_padded, model, rows, left)) for left in (True, False))
    )
    placed = "position_ids" in inspect.signature(model.forward).parameters  # and then `generate` gives them
    beside.compare(TRANSFORMERS, lambda: min(_decoded(model, rows, how, placed) for how in ("", "unmasked")))
    padded.compare(OURS, lambda: _apart(*by_learner(policy, together=True)))
    with suppress(ImportError):
        from trl import GRPOTrainer
        from trl.trainer.utils import add_fused_lm_head

        padded.compare(TRL, lambda: _by_trl(GRPOTrainer, add_fused_lm_head, model, rows))
    packed.compare(TRANSFORMERS, lambda: _packed(model, rows))
    packed.compare(OURS, lambda: _apart(*by_learner(policy)))
    return result


def _apart(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()


def _logprobs(model: PreTrainedModel, token_ids: Tensor, **options: object) -> Tensor:
    return model(input_ids=token_ids, use_cache=False, **options).logits.float().log_softmax(-1)


def _alone(model: PreTrainedModel, row: Tensor) -> Tensor:
    return _logprobs(model, row[None])[0]


def _decoded(model: PreTrainedModel, rows: Sequence[Tensor], how: str, placed: bool) -> float:
    """The difference after the prompts of these rows and after each token that their cache decodes, padded at the left.
    `how`: "in pieces" reads a prompt twice, "reordered" goes on with the third row and the first, "unmasked" gives
    decoded tokens no mask; `placed`: with positions."""
    takes, cache, start = inspect.signature(model.forward).parameters, None, 0
    token_ids, mask = _pad(rows, left=True)
    alone = torch.stack([_alone(model, row)[PROMPT - 1 - token_ids.shape[1] :] for row in rows])
    padded, positions, differences = not mask.all(), (mask.cumsum(1) - 1).clamp(min=0), []
    for end in ([PROMPT - WINDOW] if how == "in pieces" else []) + [*range(PROMPT, token_ids.shape[1] + 1)]:
        options: dict[str, Any] = {name: cache for name in CACHES if name in takes and cache is not None}
        options |= {"position_ids": positions[:, start:end]} if placed and (start or padded) else {}
        options |= {"attention_mask": mask[:, :end]} if padded and not (start and how == "unmasked") else {}
        out = model(input_ids=token_ids[:, start:end], use_cache=True, **options)
        if end >= PROMPT:
            differences.append((out.logits[:, -1].float().log_softmax(-1) - alone[:, end - PROMPT]).abs().max())
        cache = next((cache for name in CACHES if (cache := getattr(out, name, None)) is not None), None)
        if cache is None:
            raise ValueError("its forward gives no cache")
        if how == "reordered" and end == PROMPT + 3 and hasattr(cache, "reorder_cache"):
            cache.reorder_cache(torch.tensor([2, 0]))
            token_ids, mask, positions, alone = (part[[2, 0]] for part in (token_ids, mask, positions, alone))
        start = end
    return torch.stack(differences).max().item()


def _padded(model: PreTrainedModel, rows: Sequence[Tensor], left: bool, placed: bool) -> float:
    token_ids, mask = _pad(rows, left)
    positions = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if placed else {}
    out = _logprobs(model, token_ids, attention_mask=mask, **positions)
    other_pads = _logprobs(model, token_ids.masked_fill(mask == 0, 3), attention_mask=mask)
    seen = _apart(other_pads[mask.bool()], _logprobs(model, token_ids, attention_mask=mask)[mask.bool()])
    return max(seen, *(_apart(out[i][mask[i].bool()], _alone(model, row)) for i, row in enumerate(rows)))


def _best(model: PreTrainedModel, difference: Callable[[bool], float]) -> float:
    """With the positions of tokens or without, whichever a model is made for: some count from another number."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return difference(False)
    return min(difference(False), difference(True))


def _pad(rows: Sequence[Tensor], left: bool) -> tuple[Tensor, Tensor]:
    side = "left" if left else "right"
    pad = nn.utils.rnn.pad_sequence
    ones = [torch.ones_like(row) for row in rows]
    return pad(list(rows), True, 1, side), pad(ones, True, 0, side)


def _packed(model: PreTrainedModel, rows: Sequence[Tensor]) -> float:
    """Rows one after another, as trainers without padding give them: their positions begin anew."""
    positions = torch.cat([torch.arange(len(row)) for row in rows])
    out = _logprobs(model, torch.cat(list(rows))[None], position_ids=positions[None])[0]
    return max(_apart(mine, _alone(model, row)) for mine, row in zip(out.split(list(LENGTHS)), rows, strict=True))


def _by_trl(
    trainer: type[GRPOTrainer], add_head: Callable[[Any], None], model: PreTrainedModel, rows: Sequence[Tensor]
) -> float:
    """TRL's function: prompts padded at the left and completions at the right."""
    add_head(patched := copy.deepcopy(model))
    completions = [row[-n:] for row, n in zip(rows, (4, 6, DECODED), strict=True)]
    prompts = [row[: -len(completion)] for row, completion in zip(rows, completions, strict=True)]
    parts = [_pad(prompts, True), _pad(completions, False)]
    token_ids, mask = (torch.cat(pair, 1) for pair in zip(*parts, strict=True))
    myself = SimpleNamespace(accelerator=SimpleNamespace(autocast=nullcontext), temperature=1.0, model_kwarg_keys=set())
    function = inspect.unwrap(trainer._get_per_token_logps_and_entropies)  # without its profiler
    by_trl = function(myself, patched, token_ids, mask, DECODED)[0]
    return max(
        _apart(by_trl[i, : len(done)], _alone(model, row)[-len(done) - 1 : -1].gather(1, done[:, None])[:, 0])
        for i, (row, done) in enumerate(zip(rows, completions, strict=True))
    )


def _beside_others(policy: Policy, rows: Sequence[Tensor]) -> float:
    """A prompt that the engine samples alone, and beside others: the same tokens, the same log-probabilities."""
    params = SamplingParams(group_size=2, max_completion_tokens=DECODED)
    longest = max(1, policy.max_length - DECODED)
    prompts = [Prompt(f"check/{n}", "", row.tolist()[:longest]) for n, row in enumerate(rows)]
    engine = Engine(policy, policy.trunk.dtype)
    pairs = zip(engine.sample(prompts, params), (engine.sample([p], params)[0] for p in prompts), strict=True)
    completions = [(a, b) for one, other in pairs for a, b in zip(one.completions, other.completions, strict=True)]
    if any(a.token_ids != b.token_ids for a, b in completions):
        raise ValueError("other tokens beside other prompts")
    return max(_apart(torch.tensor(a.logprobs), torch.tensor(b.logprobs)) for a, b in completions)


def _short_steps(model: PreTrainedModel, policy: Policy, row: Tensor) -> list[Row]:
    """Whether a recurrent layer decodes as it reads where its time steps are short: some clamp those of a prompt."""
    model, policy = copy.deepcopy((model, policy))
    named = [*model.named_parameters(), *policy.named_parameters()]
    biases, result = [parameter for name, parameter in named if name.endswith("dt_bias")], Row("short time steps")
    for bias in biases:
        bias.fill_(-9)
    if biases:
        result.compare(TRANSFORMERS, lambda: _best(model, partial(_decoded, model, [row], "")))
        result.compare(OURS, lambda: _apart(*by_sampler(policy)))
    return [result] if biases else []


def _windows(model: PreTrainedModel, row: Tensor) -> list[Row]:
    """Whether a window that is in the configuration changes anything."""
    text = model.config.get_text_config(decoder=True)
    names = [name for name in SLIDING if isinstance(getattr(text, name, None), int)]
    if not (names and has_windows(model.config)):
        return []
    shape = copy.deepcopy(model.config)
    for name in names:
        setattr(shape.get_text_config(decoder=True), name, WIDE)
    wide = AutoModelForCausalLM.from_config(shape, dtype=torch.float32).eval()
    wide.load_state_dict(model.state_dict(), strict=False)
    changed = _apart(_alone(wide, row), _alone(model, row)) > EXACT
    result = Row("windows")
    result.say(TRANSFORMERS, "they slide" if changed else "ignored", wrong=not changed)
    return [result]


def _router(model: PreTrainedModel, row: Tensor) -> list[Row]:
    """Ties and rounding of routers in float32, and the share of tokens that have other experts in bfloat16."""
    text = model.config.get_text_config(decoder=True)
    experts, fields = routed_experts(text), text.to_dict()
    chosen = next((fields[name] for name in CHOSEN if isinstance(fields.get(name), int)), 1)
    if not 0 < chosen < experts:
        return []
    calls = _routed(model, row, experts)
    if not calls:
        return []
    result, flips = Row("router"), Row("router flips")
    ties, rounded = [], []
    for module, inputs, scores in calls:
        top = scores.topk(chosen + 1).values
        ties.append((top[:, -1] == top[:, -2]).float().mean())
        noise = 1 + 1e-5 * torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(0))
        again = _scores(module.forward(inputs[0] * noise, *inputs[1:]), experts)
        rounded.append((again == scores).float().mean())
    tied, unmoved = torch.stack(ties).mean().item(), torch.stack(rounded).mean().item()
    words = [f"{tied:.0%} of tokens tied"] * (tied > 0) + ["rounded to fewer bits"] * (unmoved > 0.1)
    result.say(TRANSFORMERS, ", ".join(words) or "no ties", wrong=bool(words))
    low = copy.deepcopy(model).to(torch.bfloat16)
    kept = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]
    for name, parameter in low.named_parameters():
        if any(part in name for part in kept):
            parameter.data = parameter.data.float()
    try:
        pairs = zip(calls, _routed(low, row, experts), strict=True)
        sets = [(scores.topk(chosen).indices, other.topk(chosen).indices) for (_, _, scores), (_, _, other) in pairs]
        share = torch.cat([(a.sort().values != b.sort().values).any(1).float() for a, b in sets]).mean().item()
        flips.say(TRANSFORMERS, f"{share:.0%} of tokens")
        if share:
            replay = "learner.routing_replay: true, or " if routers(model) else ""  # experts that quartet records
            flips.note = replay + KINDS["router-flips"].change
    except RuntimeError as error:
        flips.say(TRANSFORMERS, f"no bfloat16: {error}"[:100])
    return [result, flips]


def _routed(model: PreTrainedModel, row: Tensor, experts: int) -> list[tuple[nn.Module, tuple[Any, ...], Tensor]]:
    """Each router in a forward of a row: its inputs, and its scores [T, experts]."""
    calls: list[tuple[nn.Module, tuple[Any, ...], Tensor]] = []

    def note(module: nn.Module, inputs: tuple[Any, ...], output: object) -> None:
        scores = _scores(output, experts)
        if scores is not None and inputs:
            calls.append((module, inputs, scores))

    weights = {name: parameter for name, parameter in model.named_parameters() if re.search("gate|router", name)}
    names = {name.rpartition(".")[0] for name, w in weights.items() if w.dim() == 2 and len(w) == experts}
    hooks = [model.get_submodule(name).register_forward_hook(note) for name in names]
    try:
        _alone(model, row)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _scores(output: object, experts: int) -> Tensor | None:
    parts = output if isinstance(output, tuple | list) else [output]
    fits = (
        part for part in parts if isinstance(part, Tensor) and part.is_floating_point() and part.shape[-1] == experts
    )
    return next((part.detach().reshape(-1, experts) for part in fits), None)


@torch.enable_grad()
def _checkpointing(model: PreTrainedModel, policy: Policy, row: Tensor) -> Row:
    """The largest difference of a gradient with and without, relative to the largest entry of its tensor."""
    result = Row("gradient checkpointing")
    losses: list[tuple[str, PreTrainedModel, Callable[[], Tensor]]] = [
        (TRANSFORMERS, model, lambda: _alone(model, row)[:-1].gather(1, row[1:, None]).sum()),
        (OURS, policy.trunk, lambda: by_learner(policy)[0].sum()),
    ]
    for column, trunk, loss in losses:
        if not trunk.supports_gradient_checkpointing:
            result.say(column, "not offered")
            continue
        result.compare(column, lambda trunk=trunk, loss=loss: _with_and_without(trunk, loss), most=1e-2)  # type: ignore[misc]
    return result


def _with_and_without(trunk: PreTrainedModel, loss: Callable[[], Tensor]) -> float:
    plain = _gradients(trunk, loss)
    layers = checkpoint_layers(trunk)
    try:
        again = _gradients(trunk, loss)
    finally:
        trunk.gradient_checkpointing_disable()
        for layer in layers:
            layer.training = False
    least = max(gradient.abs().max().item() for gradient in plain.values()) / 1000
    if plain.keys() != again.keys():
        raise ValueError(f"no gradient for {sorted(plain.keys() ^ again.keys())[0]}")
    return max(_apart(again[name], plain[name]) / max(plain[name].abs().max().item(), least) for name in plain)


def _gradients(trunk: PreTrainedModel, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    trunk.zero_grad()
    loss().backward()
    return {name: p.grad.clone() for name, p in trunk.named_parameters() if p.grad is not None}


def _lm_head(model: PreTrainedModel, policy: Policy, row: Tensor) -> Row:
    """Whether the LM head is the embedding where the configuration says so, and multiplies what we multiply."""
    result, lm_head, embedding = Row("LM head"), model.get_output_embeddings(), model.get_input_embeddings()
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    result.compare(OURS, lambda: _apart(*by_lm_head(policy)))
    if not isinstance(getattr(lm_head, "weight", None), Tensor):
        result.say(TRANSFORMERS, "of its own kind")
        return result
    same = lm_head.weight is embedding.weight
    states, _ = last_states(model, "head", input_ids=row[None], use_cache=False)
    expected = F.linear(states, embedding.weight if tied else lm_head.weight, getattr(lm_head, "bias", None))
    words = "tied" if same else "apart"
    if tied != same:
        words += f", and tie_word_embeddings={str(tied).lower()}"
    elif _apart(lm_head(states), expected) > STOCK:
        words += ", and its forward multiplies by another weight"
    result.say(TRANSFORMERS, words, wrong="and" in words)
    return result


def reach_of_lora(shape: PretrainedConfig) -> Row:
    """The share of a full model's matrices that LoRA adapts by default."""
    result = Row("LoRA")
    try:
        with torch.device("meta"), quiet():
            share, left = lora.reach(AutoModelForCausalLM.from_config(shape))
        result.say(OURS, f"reaches {share:.0%} of the weights")
        if share < 0.9:
            result.note = f"{KINDS['lora'].change}: {lora.reach_in_words(share, left)}"
    except Exception as error:  # of transformers or peft, whose models are of many forms
        result.say(OURS, f"{type(error).__name__}: {error}"[:200], wrong=True)
    return result


# ---- tokens and templates --------------------------------------------------------------------------------------------


def examine_text(tokenizer: PreTrainedTokenizerBase, stops: Sequence[int], vocabulary: int | None = None) -> list[Row]:
    """The rows of the table that a tokenizer gives, for an embedding of so many tokens."""
    template, trip, ends = Row("template"), Row("round trip"), Row("stop and pad")
    end, words, wrong = _template(tokenizer)
    template.say(TRANSFORMERS, words, wrong)
    text, bos, dropped = str(tokenizer.chat_template), tokenizer.bos_token, " and ".join(dropping(tokenizer))
    notes = {
        f"an agent learns each turn as a server shows it, without thoughts before {dropped}": dropped,
        "mend chat_template.jinja, or chat_template in tokenizer_config.json": wrong,
        KINDS["chat-template"].change: words in ("loses spaces", "rewrites turns", "drops earlier thoughts", TRIMS),
        "its prompt has the time of now: give date_string in data.chat_template_kwargs": "strftime_now" in text,
        f"encode what it renders with add_special_tokens=False, else {bos!r} comes twice": "bos_token" in text
        and tokenizer.encode("2")[:1] == [tokenizer.bos_token_id],
    }
    template.note = "; ".join(note for note, holds in notes.items() if holds)
    changed = tokenizer.decode(tokenizer.encode(TEXT, add_special_tokens=False)).lstrip() != TEXT
    ordinary = sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids))
    ids = ordinary[:: max(1, len(ordinary) // 1000)]
    others = sum(tokenizer.encode(tokenizer.decode([i]), add_special_tokens=False) != [i] for i in ids) / len(ids)
    trip.say(TRANSFORMERS, f"{others:.1%} of ids come back as others" + ", and text is changed" * changed, changed)
    stops = list(stops) or ([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])
    names = ", ".join(repr(tokenizer.decode([stop])) for stop in stops)
    last = max([ordinary[-1], *stops])
    if vocabulary and last >= vocabulary:
        trip.say(TRANSFORMERS, f"id {last} is not in the embedding, of {vocabulary} tokens", wrong=True)
        trip.note = "take the tokenizer of this model, or set vocab_size in config.json to what the weights are"
    if not stops:
        ends.say(TRANSFORMERS, "no stop token", wrong=True)
    elif end is None and words in READABLE:
        ends.say(TRANSFORMERS, "a turn of the template has no end", wrong=True)
        ends.note = "let the chat template write the token that ends a turn after each answer"
    elif end is not None and end not in stops:
        ends.say(TRANSFORMERS, f"a turn ends with {tokenizer.decode([end])!r}, and stops are {names}", wrong=True)
    elif tokenizer.pad_token_id in stops:
        ends.say(TRANSFORMERS, f"{tokenizer.pad_token!r} is both")
        ends.note = "a trainer that masks pads never teaches the stop: set another pad_token; quartet counts lengths"
    else:
        ends.say(TRANSFORMERS, names)
    return [template, trip, ends]


def _template(tokenizer: PreTrainedTokenizerBase) -> tuple[int | None, str, bool]:
    """The token that ends a turn, what the template does to what was said before, and whether that is wrong."""
    if not tokenizer.chat_template:
        return None, "none", False

    def render(said: str, turns: int, begins: bool) -> str:
        messages = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": said}]
        messages.append({"role": "user", "content": "Sure?"})
        return str(tokenizer.apply_chat_template(messages[:turns], tokenize=False, add_generation_prompt=begins))

    try:
        opened, first, one, two = (render(SAID, *how) for how in ((1, False), (1, True), (2, False), (3, True)))
        thoughts = render(f"<think>\n{THOUGHT}\n</think>\n\n{SAID}", 3, True)
        trimmed = render(f" {SAID} ", 3, True)
    except Exception as error:  # whatever a template raises
        return None, f"{type(error).__name__}: {error}"[:200], True
    without = [re.sub(r"<think>.*?</think>\s*|<think>\s*$", "", text, flags=re.DOTALL) for text in (first, one, two)]
    after = tokenizer.encode(one.rpartition(SAID)[2].lstrip(), add_special_tokens=False)
    end = after[0] if SAID in one and after else None
    if SAID not in two:
        same_words = " ".join(SAID.split()) in " ".join(two.split())
        return end, "loses spaces" if same_words else "rewrites turns", True
    if not (without[1].startswith(without[0].rstrip()) and without[2].startswith(without[1].rstrip())):
        return end, "rewrites turns", True
    between = without[1][len(without[0].rstrip()) :].partition(SAID)[0].strip()
    if opened == first and between:
        return end, f"opens no answer: {between!r} is left to the model", True
    if tokenizer.encode(first, add_special_tokens=False)[:2] == [tokenizer.bos_token_id] * 2:
        return end, f"begins twice with {tokenizer.bos_token!r}", True
    if THOUGHT not in thoughts or not two.startswith(one.rstrip()):
        return end, "drops earlier thoughts", False
    return end, "keeps turns" if f" {SAID} " in trimmed else TRIMS, False


# ---- the report ------------------------------------------------------------------------------------------------------


def report(model: str, rows: Sequence[Row]) -> Report:
    """The rows as a table, and a finding for each that is wrong or has a note."""
    columns = [name for name in (TRANSFORMERS, OURS, TRL) if any(name in row.values for row in rows)]
    table = [{"compared": row.name} | {column: row.cell(column) for column in columns} for row in rows]
    title = f"{model}, a small model with random weights in float32"
    findings = [finding for row in rows if (finding := row.finding)]
    return Report(title, findings, tables={"differences": table})

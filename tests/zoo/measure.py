"""Does each type of the zoo compute the same by every path?

    PYTHONPATH=.:tests python tests/zoo/measure.py [KIND ...]

The reference is each row alone by the whole forward. Against it stand transformers' own cache with left-padded rows,
padded rows without a cache, and our own engine and packed rows. It writes `runs/zoo.json`, a type at a time.
"""

from __future__ import annotations

import inspect
import json
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import zoo
from grpo.learner.batch import collate
from grpo.learner.row import PackedRow, Sample
from grpo.source.agreement import check_agreement
from policies.attention import Packing
from policies.logprobs import token_logprobs
from policies.policy import Policy
from rollout.engine import Engine
from rollout.group import Prompt
from rollout.sampling import SamplingParams

LENGTHS = (5, 19, 37)  # of the prompts; windows, blocks and chunks are of 8 tokens
DECODED = 14
FAN = 2  # completions of a prompt
LEAVES = 5  # the step before which a row leaves
SECONDS = 100  # a type
WIDE = {"sliding_window": 512, "sliding_window_size": 512, "attention_chunk_size": 512}
CACHES = ("cache", "past_key_values", "state", "mems")
REPORT = Path("runs/zoo.json")


class Stock:
    """A model as transformers calls it: what its forward takes, its cache, and each row alone."""

    def __init__(self, model: Any, shift: int = 0, mask_steps: bool = True) -> None:
        """`shift`: the position of the first token, `mask_steps`: whether to give the mask after the prefill too."""
        self.shift, self.mask_steps = shift, mask_steps
        self.model, self.wide = model, torch.promote_types(model.dtype, torch.float32)
        self.takes = inspect.signature(type(model).forward).parameters
        self.rows = [torch.randint(2, zoo.VOCABULARY, (length + DECODED,)) for length in LENGTHS]

    def alone(self, row: Tensor) -> Tensor:
        """Log-probabilities [T, V] after each token of the row."""
        return self.model(input_ids=row[None], **self.no_cache()).logits[0].to(self.wide).log_softmax(-1)

    def no_cache(self) -> dict[str, Any]:
        return {"use_cache": False} if "use_cache" in self.takes else {}

    def masks(self, mask: Tensor, new: int) -> dict[str, Tensor]:
        """What tells the forward of padding, for the last `new` tokens."""
        options = {"attention_mask": mask} if "attention_mask" in self.takes else {}
        if "position_ids" in self.takes:
            options["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -new:] + self.shift
        return options

    def decode(self, rows: list[Tensor], fan: int, leaves: bool) -> float:
        """The largest difference of prompts that are left-padded, prefilled, fanned out and decoded together. Rows of
        one length have no padding and are given no mask."""
        prompts = [row[:-DECODED] for row in rows]
        ids, mask = _padded(prompts, left=True)
        padded = not bool(mask.all())
        out = self._step(ids, mask, None, padded)
        want = torch.stack([self.alone(row)[-DECODED - 1 :] for row in rows])
        tokens = torch.stack([row[-DECODED:] for row in rows])
        here = out.logits[:, -1].to(self.wide).log_softmax(-1)
        worst = _apart(here, want[:, 0])
        cache = _cache(out)
        if fan > 1:
            index = torch.arange(len(rows)).repeat_interleave(fan)
            select(cache, index)
            tokens, want, mask = tokens[index], want[index], mask[index]
        for step in range(DECODED):
            if leaves and step == LEAVES:
                index = torch.tensor([i for i in range(len(tokens)) if i != 1])
                select(cache, index)
                tokens, want, mask = tokens[index], want[index], mask[index]
            mask = F.pad(mask, (0, 1), value=1)
            out = self._step(tokens[:, step : step + 1], mask, cache, padded)
            cache = _cache(out)
            worst = max(worst, _apart(out.logits[:, -1].to(self.wide).log_softmax(-1), want[:, step + 1]))
        return worst

    def _step(self, ids: Tensor, mask: Tensor, cache: Any, padded: bool) -> Any:
        new = ids.shape[1]
        options: dict[str, Any] = self.masks(mask, new) if padded else {}
        if cache is not None and not self.mask_steps:
            options.pop("attention_mask", None)
        if not padded and "position_ids" in self.takes:
            options["position_ids"] = torch.arange(mask.shape[1] - new, mask.shape[1]).expand(len(ids), -1) + self.shift
        if "use_cache" in self.takes:
            options["use_cache"] = True
        if cache is not None:
            options[next(name for name in CACHES if name in self.takes)] = cache
        return self.model(input_ids=ids, **options)

    def padded_rows(self, left: bool, masked: bool) -> tuple[float, float]:
        """The largest difference of padded rows without a cache: of log-probabilities, and of gradients relative to
        the largest gradient of each tensor."""
        ids, mask = _padded(self.rows, left)
        options = self.masks(mask, ids.shape[1]) if masked else {}
        logprobs = self.model(input_ids=ids, **options, **self.no_cache()).logits.to(self.wide).log_softmax(-1)
        worst, chosen = 0.0, []
        for i, row in enumerate(self.rows):
            mine = logprobs[i, -len(row) :] if left else logprobs[i, : len(row)]
            worst = max(worst, _apart(mine[-DECODED - 1 :], self.alone(row)[-DECODED - 1 :]))
            chosen.append(mine[-DECODED - 1 : -1].gather(1, row[-DECODED:, None]).sum())
        wanted = gradients(self.model, lambda: sum(self._completion(row) for row in self.rows))
        return worst, _gradients_apart(gradients(self.model, lambda: sum(chosen)), wanted)

    def _completion(self, row: Tensor, count: int = DECODED) -> Tensor:
        return self.alone(row)[-count - 1 : -1].gather(1, row[-count:, None]).sum()


def gradients(model: Any, total: Callable[[], Any]) -> dict[str, Tensor]:
    model.zero_grad()
    with torch.enable_grad():
        total().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def select(cache: Any, index: Tensor) -> None:
    """These rows of the cache, in this order and as often."""
    if hasattr(cache, "reorder_cache"):
        cache.reorder_cache(index)
        if hasattr(cache, "linear_cache"):  # MiniMax: its own, which that leaves alone
            cache.linear_cache = [state if isinstance(state, list) else state[index] for state in cache.linear_cache]
    elif isinstance(cache, list):
        cache[:] = [tensor.index_select(0, index) for tensor in cache]
    else:
        raise TypeError(f"{type(cache).__name__} has no reorder_cache")


def _cache(out: Any) -> Any:
    found = [getattr(out, name) for name in CACHES if getattr(out, name, None) is not None]
    if not found:
        raise TypeError("its forward returns no cache")
    return found[0]


def _padded(rows: list[Tensor], left: bool) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    gaps = [(longest - len(row), 0) if left else (0, longest - len(row)) for row in rows]
    ids = torch.stack([F.pad(row, gap, value=1) for row, gap in zip(rows, gaps, strict=True)])
    mask = torch.stack([F.pad(torch.ones_like(row), gap) for row, gap in zip(rows, gaps, strict=True)])
    return ids, mask


def _apart(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item() if not (one.isnan().any() or other.isnan().any()) else float("nan")


def _gradients_apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Relative to the largest gradient of each tensor, or to a thousandth of the largest of all."""
    least = max(tensor.abs().max().item() for tensor in other.values()) / 1000
    apart = [
        _apart(one.get(name, torch.zeros_like(tensor)), tensor) / max(tensor.abs().max().item(), least)
        for name, tensor in other.items()
    ]
    return max(apart)


def ours(kind: str) -> dict[str, Any]:
    """Our engine and our packed rows, in rows that pay for blocks and in rows that do not. A context that a window
    bounds is measured with a wide one, as our engine has no other."""
    policy = zoo.policy(kind)
    found: dict[str, Any] = {"context": policy.max_length}
    wide = _wide(policy.config) if policy.max_length < 64 else {}
    policy = zoo.policy(kind, **wide)
    found["load check"] = _tried(lambda: check_agreement(policy) or "passes")
    stock = Stock(
        zoo.tiny(kind, **wide)
    )  # a policy's trunk attends by our kernel, and some types then leave out theirs
    torch_rows = [torch.randint(2, zoo.VOCABULARY, (length,)) for length in LENGTHS]
    prompts = [Prompt(str(row.numel()), "", row.tolist()) for row in torch_rows]
    params = SamplingParams(group_size=12, max_completion_tokens=8)

    def engine() -> float:
        worst = 0.0
        for prompt, group in zip(prompts, Engine(policy, torch.float32).sample(prompts, params), strict=True):
            for completion in group.completions:
                row = torch.tensor(prompt.token_ids + completion.token_ids)
                count = len(completion.token_ids)
                want = stock.alone(row)[-count - 1 : -1].gather(1, row[-count:, None])[:, 0]
                worst = max(worst, _apart(torch.tensor(completion.logprobs), want))
        return worst

    with torch.no_grad():
        found["engine"] = _tried(engine)
    for name, length, count, pays in (("short", 5, 8, True), ("blocks", 37, 12, True), ("mask", 37, 2, False)):
        prompt = next(row for row in torch_rows if len(row) == length).tolist()
        samples = [torch.randint(2, zoo.VOCABULARY, (8,)).tolist() for _ in range(count)]
        found[name] = _tried(partial(_packed, policy, stock, prompt, samples, pays))
    return found


def _packed(policy: Policy, stock: Stock, prompt: list[int], samples: list[list[int]], pays: bool) -> Any:
    mini = collate([PackedRow(prompt, [Sample(i, ids) for i, ids in enumerate(samples)])], policy.device)
    assert Packing(mini.segment).pays is pays
    hidden = policy.hidden(mini.token_ids, mini.position_ids, mini.segment)
    preceding = hidden.gather(1, mini.before[..., None].expand_as(hidden))[mini.scored]
    packed = token_logprobs(preceding @ policy.lm_head.T, mini.token_ids[mini.scored])
    rows = [torch.tensor(prompt + ids) for ids in samples]
    alone = [stock.alone(row)[-9:-1].gather(1, row[-8:, None])[:, 0] for row in rows]
    worst = _apart(packed, torch.cat(alone))
    wanted = gradients(stock.model, lambda: torch.cat(alone).sum())
    return worst, _gradients_apart(gradients(policy.trunk, lambda: packed.sum()), wanted)


def _wide(config: Any) -> dict[str, int]:
    return {name: value for name, value in WIDE.items() if getattr(config, name, None) is not None}


def facts(model: Any) -> dict[str, Any]:
    """What the forward takes, and how its logits come of the decoder's hidden states."""
    takes, lm_head = inspect.signature(type(model).forward).parameters, model.get_output_embeddings()
    config = model.config.get_text_config(decoder=True)
    code = inspect.getsource(inspect.unwrap(type(model).forward)).splitlines()
    steps = [line.strip() for line in code if "logits" in line and ("=" in line) and "logits_to_keep" not in line]
    ids = torch.randint(2, zoo.VOCABULARY, (1, 20))
    logits = model(input_ids=ids, **({"use_cache": False} if "use_cache" in takes else {})).logits

    def by_module() -> float:
        return _apart(lm_head(model.get_decoder()(input_ids=ids).last_hidden_state), logits)

    def scale() -> Any:
        plain = lm_head(model.get_decoder()(input_ids=ids).last_hidden_state)
        ratio = (logits * plain).sum() / (plain * plain).sum()
        return [round(ratio.item(), 5), _apart(ratio * plain, logits)]

    return {
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": getattr(config, "layer_types", None) or f"{getattr(config, 'num_hidden_layers', '?')} alike",
        "mlp": getattr(config, "mlp_layer_types", None),
        "tied": bool(getattr(config, "tie_word_embeddings", False)),
        "head": type(lm_head).__name__,
        "head bias": getattr(lm_head, "bias", None) is not None,
        "decoder": type(model.get_decoder()).__name__,
        "logits - head(decoder)": _tried(by_module),
        "scale": _tried(scale),
        "steps": [line for line in steps if "loss" not in line][:6],
        "takes": [name for name in (*CACHES, "position_ids", "attention_mask", "logits_to_keep") if name in takes],
    }


HOW: tuple[dict[str, Any], ...] = ({}, {"mask_steps": False}, {"shift": 2})  # as `Stock` takes them


def stock_paths(model: Any) -> dict[str, Any]:
    """Everything that is asked of transformers alone, in the first way in which padded rows decode right."""
    tries = [Stock(model, **how) for how in HOW]
    with torch.no_grad():
        decoded = [_tried(partial(stock.decode, stock.rows, 1, False)) for stock in tries]
        right = [i for i, worst in enumerate(decoded) if isinstance(worst, float) and worst < 1e-3]
        best = right[0] if right else 0
        stock = tries[best]
        cache = _tried(lambda: _cache(stock._step(*_padded(stock.rows[:1], True), None, False)))
        found = {
            "how": str(HOW[best]),
            "cache": cache if isinstance(cache, str) else _describe(cache),
            "decode": decoded[best],
            "decode, fan, leave": _tried(lambda: stock.decode(stock.rows, FAN, True)),
            "decode alone": _tried(lambda: max(stock.decode([row], 3, True) for row in stock.rows)),
        }
    for name, left, masked in (("right", False, True), ("left", True, True), ("right, no mask", False, False)):
        found[name] = _tried(partial(stock.padded_rows, left, masked))
    with torch.no_grad(), suppress(AttributeError, ValueError):
        model.set_experts_implementation("eager")
    with torch.no_grad():  # what is left in float64 is no rounding
        doubled = Stock(model.double(), stock.shift, stock.mask_steps)
        found["float64"] = _tried(lambda: doubled.decode(doubled.rows, FAN, True))
        found["float64 alone"] = _tried(lambda: max(doubled.decode([row], 3, True) for row in doubled.rows))
    return found


def _describe(cache: Any) -> str:
    names = [type(layer).__name__ for layer in getattr(cache, "layers", [])]
    return f"{type(cache).__name__}: {' '.join(dict.fromkeys(names))}"


def _tried(step: Callable[[], Any]) -> Any:
    try:
        return step()
    except TimeoutError:
        raise
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:160]}"


def measured(kind: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model = zoo.tiny(kind)
    told = facts(model)
    return told | {"stock": stock_paths(model), "ours": _tried(lambda: ours(kind))}


def line(kind: str, found: dict[str, Any]) -> str:
    """A type as a line of the table."""
    if "stock" not in found:
        return f"{kind:26} {found['error']}"
    columns = [_short(found["stock"][name]) for name in ("decode", "decode, fan, leave", "decode alone")]
    columns.append("/".join(_short(found["stock"][name]) for name in ("float64", "float64 alone")))
    columns += [_short(found["stock"][name]) for name in ("right", "left", "right, no mask")]
    own = found["ours"] if isinstance(found["ours"], dict) else {}
    columns += [_short(own.get(name, found["ours"])) for name in ("engine", "short", "blocks", "mask", "load check")]
    return f"{kind:26} " + " ".join(f"{column:>11}" for column in columns)


def _short(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "/".join(_short(part) for part in value)
    return f"{value:.0e}" if isinstance(value, float) else str(value)[:11]


def _out_of_time(*_: object) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _out_of_time)
    REPORT.parent.mkdir(exist_ok=True)
    table = json.loads(REPORT.read_text()) if REPORT.exists() else {}
    for kind in names or [kind for kind in (*zoo.kinds(), *zoo.variants()) if kind not in table]:
        start = time.perf_counter()
        signal.alarm(SECONDS)
        try:
            table[kind] = measured(kind)
        except Exception as error:
            table[kind] = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
        finally:
            signal.alarm(0)
        table[kind]["seconds"] = round(time.perf_counter() - start, 1)
        REPORT.write_text(json.dumps(table, indent=1))
        print(line(kind, table[kind]), flush=True)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main(sys.argv[1:])

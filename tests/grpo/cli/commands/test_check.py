"""`quartet check` notices what is wrong: models, routers, heads and templates are broken on purpose."""

import json
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.masking_utils import create_causal_mask
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.mixtral import modeling_mixtral as mixtral
from transformers.models.qwen2 import modeling_qwen2 as qwen2

from grpo.cli.commands.check import EXACT, WHAT_TO_DO, Row, examine, examine_text
from grpo.cli.parse import main
from policies.presets import small_tokenizer

STEPS = "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '<|end|>\n' }}{% endfor %}"
BEGINS = "{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture
def without_trl(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)


def _wrong(rows: list[Row]) -> dict[str, list[str]]:
    return {row.name: row.wrong for row in rows if row.wrong}


# ---- what is broken, and in which line it is named -------------------------------------------------------------------


def _visible(ahead: int) -> Callable[..., torch.Tensor]:
    """A mask under which a token sees so many after it."""

    def mask(inputs_embeds, cache=None, **rest):
        new, past = inputs_embeds.shape[1], 0 if cache is None else cache.get_seq_length()
        hidden = torch.ones(new, past + new).triu(past + 1 + ahead).bool()
        return torch.zeros(len(inputs_embeds), 1, *hidden.shape).masked_fill(hidden, -1e30)

    return mask


def _sees_everything(patch):
    patch.setattr(llama, "create_causal_mask", _visible(ahead=1000))


def _sees_the_next_token(patch):
    patch.setattr(llama, "create_causal_mask", _visible(ahead=1))


def _window_of_mistral(patch):
    patch.setattr(mistral, "create_sliding_window_causal_mask", create_causal_mask)


def _window_of_qwen2(patch):
    patch.setattr(qwen2, "create_sliding_window_causal_mask", create_causal_mask)


def _positions_ignored(patch):
    forward = llama.LlamaModel.forward
    patch.setattr(
        llama.LlamaModel, "forward", lambda self, *args, position_ids=None, **rest: forward(self, *args, **rest)
    )


def _position_off_by_one(patch):
    forward = llama.LlamaRotaryEmbedding.forward
    patch.setattr(
        llama.LlamaRotaryEmbedding,
        "forward",
        lambda self, x, position_ids: forward(self, x, position_ids + (x.shape[1] == 1)),
    )


def _attention_across_packed_rows(patch):
    patch.setattr(llama, "create_causal_mask", lambda position_ids=None, **rest: create_causal_mask(**rest))


def _state_across_packed_rows(patch):
    """Falcon-H1's own recurrent state goes on where the next row begins."""


def _mean_of_the_batch(patch):
    forward = llama.LlamaMLP.forward
    patch.setattr(llama.LlamaMLP, "forward", lambda self, x: forward(self, x + x.mean(0, keepdim=True)))


def _state_of_the_row_before(patch):
    forward = llama.LlamaMLP.forward
    patch.setattr(llama.LlamaMLP, "forward", lambda self, x: forward(self, x + 0.3 * (x.roll(1, 0) - x)))


def _entry_overwritten(patch):
    update = DynamicLayer.update

    def wrong(self, keys, values, *args, **rest):
        if self.is_initialized and self.keys.shape[-2] > 1:
            self.keys = torch.cat([self.keys[..., :-1, :], self.keys[..., -2:-1, :]], -2)
        return update(self, keys, values, *args, **rest)

    patch.setattr(DynamicLayer, "update", wrong)


def _keys_of_another_layer(patch):
    update = DynamicCache.update

    def wrong(self, keys, values, layer_idx, *args, **rest):
        all_keys, all_values = update(self, keys, values, layer_idx, *args, **rest)
        return (self.layers[0].keys if keys.shape[-2] == 1 else all_keys), all_values

    patch.setattr(DynamicCache, "update", wrong)


def _router(change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[[Any], None]:
    def forward(self, hidden_states):
        logits = change(hidden_states.reshape(-1, self.hidden_dim), self.weight)
        top, indices = logits.softmax(-1).topk(self.top_k)
        return logits, top / top.sum(-1, keepdim=True), indices

    return lambda patch: patch.setattr(mixtral.MixtralTopKRouter, "forward", forward)


class _Drifted(nn.Linear):
    def forward(self, states):
        return F.linear(states, 1.1 * self.weight)


def _another_weight_in_the_forward(patch):
    init = llama.LlamaForCausalLM.__init__

    def drifted(self, config):
        init(self, config)
        self.lm_head.__class__ = _Drifted

    patch.setattr(llama.LlamaForCausalLM, "__init__", drifted)


def _never_tied(patch):
    patch.setattr(llama.LlamaForCausalLM, "_tied_weights_keys", {})


BROKEN = {
    "causal": [(_sees_everything, "llama"), (_sees_the_next_token, "llama")],
    "windows": [(_window_of_mistral, "mistral"), (_window_of_qwen2, "qwen2/sliding")],
    "packed = alone": [
        (_positions_ignored, "llama"),
        (_attention_across_packed_rows, "llama"),
        (_state_across_packed_rows, "falcon_h1"),
    ],
    "prefill + decode = whole forward": [
        (_position_off_by_one, "llama"),
        (_entry_overwritten, "llama"),
        (_keys_of_another_layer, "llama"),
    ],
    "batch invariance": [(_mean_of_the_batch, "llama"), (_state_of_the_row_before, "llama")],
    "router": [
        (_router(lambda states, weight: F.linear(states.bfloat16(), weight.bfloat16()).float()), "mixtral"),
        (_router(lambda states, weight: F.linear(states, weight).round()), "mixtral"),
    ],
    "LM head": [(_another_weight_in_the_forward, "llama"), (_never_tied, "llama")],
}


@pytest.mark.parametrize(
    ("line", "breaks", "kind"),
    [
        pytest.param(line, *case, marks=[pytest.mark.slow] * (place > 0))  # one of each line is quick
        for line in BROKEN
        for place, case in enumerate(BROKEN[line])
    ],
)
def test_a_broken_model_is_named_in_its_line(without_trl, monkeypatch, line, breaks, kind):
    config = zoo.tiny_config(kind)
    config.tie_word_embeddings = line == "LM head"
    breaks(monkeypatch)
    named = next(row for row in examine(config) if row.name == line)
    assert "transformers" in named.wrong
    assert named.advice == WHAT_TO_DO[line]


@pytest.mark.parametrize(
    ("line", "template", "words"),
    [
        ("template", STEPS.replace("m.content", "loop.revindex|string + m.content") + BEGINS, "rewrites turns"),
        ("template", STEPS.replace("m.content", "m.content.split()|join(' ')") + BEGINS, "loses spaces"),
        ("stop and pad", STEPS.replace("<|end|>", "</turn>") + BEGINS, "a turn ends with '<', and stops are '<|end|>'"),
        ("stop and pad", STEPS + BEGINS, "no stop token"),
    ],
)
def test_a_broken_template_is_named_in_its_line(line, template, words):
    tokenizer = small_tokenizer(["2 + 2 = 4\n"], 272)
    tokenizer.chat_template = template
    tokenizer.eos_token = None if words == "no stop token" else tokenizer.eos_token
    named = next(row for row in examine_text(tokenizer, []) if row.name == line)
    assert (named.values, named.wrong) == ({"transformers": words}, ["transformers"])


def test_a_tokenizer_that_changes_text_is_named_and_what_is_only_worth_knowing_is_not_wrong():
    tokenizer = small_tokenizer(["2 + 2 = 4\n"], 272)
    tokenizer.chat_template = (STEPS + BEGINS).replace("m.content", "m.content.split('</think>')[-1]|trim")
    tokenizer.pad_token = tokenizer.eos_token
    template, trip, ends = examine_text(tokenizer, [0])
    assert _wrong([template, trip, ends]) == {}
    assert (template.values["transformers"], ends.values["transformers"]) == (
        "drops earlier thoughts",
        "'<|end|>' is both",
    )
    decode = tokenizer.decode
    tokenizer.decode = lambda ids: decode(ids).replace(" ,", ",")
    assert "text is changed" in examine_text(tokenizer, [0])[1].values["transformers"]


# ---- what is right ---------------------------------------------------------------------------------------------------


def test_layers_that_are_computed_again_drop_nothing(without_trl):
    """OPT drops in the layer itself, which checkpoints only in training mode."""
    assert _wrong(examine(zoo.tiny_config("opt"))) == {"packed = alone": ["transformers"]}


@pytest.mark.parametrize(
    "kind", ["llama", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("mixtral", "deepseek_v3", "falcon"))]
)
def test_what_is_right_has_small_numbers(without_trl, kind):
    rows = examine(zoo.tiny_config(kind))
    assert _wrong(rows) == {}
    numbers = [value for row in rows for value in row.values.values() if isinstance(value, float)]
    assert max(numbers) < EXACT
    assert len(numbers) >= 11
    assert ("router" in [row.name for row in rows]) == (kind in ("mixtral", "deepseek_v3"))


def test_trl_reads_learned_positions_beside_padding(monkeypatch):
    """TRL gives its padded rows no positions: right for rotations, wrong where positions are learned."""
    pytest.importorskip("trl")
    assert _wrong(examine(zoo.tiny_config("gpt2"))) == {"left = right padding": ["TRL"]}


def test_the_command_writes_a_table_and_json_and_ends_with_1_where_something_is_wrong(
    without_trl, monkeypatch, tmp_path, capsys
):
    zoo.policy("llama").save(tmp_path / "model")
    out = tmp_path / "out.json"
    assert main(["check", str(tmp_path / "model"), "--json", str(out)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("loading")
    assert "prefill + decode" in shown
    written = json.loads(out.read_text())
    assert written["right"]
    assert [row["name"] for row in written["rows"]][-3:] == ["template", "round trip", "stop and pad"]
    _entry_overwritten(monkeypatch)
    assert main(["check", str(tmp_path / "model"), "--layers", "2"]) == 1
    assert "WRONG" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["qwen33"], "model='qwen33': there is no such folder; .*; did you mean the type 'qwen3' of transformers"),
        (["clip"], "model='clip': transformers has no causal language model of this type; name another"),
        (
            ["lfm2_moe"],
            "model='lfm2_moe': no small model of type 'lfm2_moe' can be built: .*; name a folder or a hub id",
        ),
        (["llama", "--layers", "0"], "--layers=0: give 1 or more of each kind"),
    ],
)
def test_what_cannot_be_checked_says_why(words, message, capsys):
    assert main(["check", *words]) in (1, 2)
    assert re.search(message, capsys.readouterr().err)

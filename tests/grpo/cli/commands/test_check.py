"""`quartet check` notices what is wrong: models, routers, heads and templates are broken on purpose, some of them as
bugs of public trackers are described."""

import importlib
import inspect
import json
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from tokenizers import normalizers
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import PreTrainedModel, cache_utils, masking_utils
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import create_causal_mask

from grpo.cli.commands import check as check_module
from grpo.cli.commands.check import COMPARED, EXACT, TRANSFORMERS, Row, examine, examine_text
from grpo.cli.parse import main
from policies.presets import small_tokenizer
from rewards.kinds import ERROR, KINDS, NOTE, sections

STEPS = "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '<|end|>\n' }}{% endfor %}"
BEGINS = "{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture
def without_trl(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)


def _wrong(rows: list[Row]) -> dict[str, list[str]]:
    return {row.name: row.wrong for row in rows if row.wrong}


def _only(patch: pytest.MonkeyPatch, *lines: str) -> None:
    """Of all that is compared only these lines of transformers itself: the rest takes nine tenths of the time."""
    compare = Row.compare

    def chosen(self, column, difference, **options):
        if column == TRANSFORMERS and self.name in lines:
            compare(self, column, difference, **options)

    patch.setattr(Row, "compare", chosen)
    patch.setattr(check_module, "choose_paths", lambda *_: None)


def _modeling(kind: str) -> Any:
    return importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")


def _instead(patch: pytest.MonkeyPatch, owner: Any, name: str, function: Callable[..., Any]) -> None:
    """Calls `function` with what it replaces first."""
    usual = getattr(owner, name)
    patch.setattr(owner, name, lambda *args, **rest: function(usual, *args, **rest))


PACKED = "packed = alone"
llama, mixtral = _modeling("llama"), _modeling("mixtral")


def _sees_the_next_token(patch):
    def mask(inputs_embeds, cache=None, **rest):
        new, past = inputs_embeds.shape[1], 0 if cache is None else cache.get_seq_length()
        hidden = torch.ones(new, past + new).triu(past + 2).bool()
        return torch.zeros(len(inputs_embeds), 1, *hidden.shape).masked_fill(hidden, -1e30)

    patch.setattr(llama, "create_causal_mask", mask)


def _window_ignored(kind: str) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(_modeling(kind), "create_sliding_window_causal_mask", create_causal_mask)


def _positions_ignored(owner: Any) -> Callable[[pytest.MonkeyPatch], None]:
    def forward(usual, self, *args, position_ids=None, **rest):
        return usual(self, *args, **rest)

    return lambda patch: _instead(patch, owner, "forward", forward)


def _position_off_by_one(patch):
    def forward(usual, self, x, position_ids):
        return usual(self, x, position_ids + (x.shape[1] == 1))

    _instead(patch, llama.LlamaRotaryEmbedding, "forward", forward)


def _state_across_packed_rows(patch):
    """Falcon-H1's own recurrent state goes on where the next row begins."""


def _mlp(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: _instead(patch, llama.LlamaMLP, "forward", lambda usual, self, x: usual(self, change(x)))


def _entry_overwritten(patch):
    update = DynamicLayer.update

    def wrong(self, keys, values, *args, **rest):
        if self.is_initialized and self.keys.shape[-2] > 1:
            self.keys = torch.cat([self.keys[..., :-1, :], self.keys[..., -2:-1, :]], -2)
        return update(self, keys, values, *args, **rest)

    patch.setattr(DynamicLayer, "update", wrong)


def _mixtral_router(change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[[Any], None]:
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


def the_padding_mask_is_read_backwards(patch):
    def mask(usual, attention_mask=None, **rest):
        return usual(attention_mask=None if attention_mask is None else attention_mask.flip(1), **rest)

    _instead(patch, _modeling("qwen3"), "create_causal_mask", mask)


def the_window_of_a_prompt_is_wider_than_its_cache(patch):
    _instead(patch, masking_utils, "sliding_window_overlay", lambda usual, window: usual(window + 1))


def only_the_first_packed_row_is_apart(patch):
    def sequences(usual, position_ids):
        numbers = usual(position_ids)
        return None if numbers is None else numbers.clamp(max=1)

    _instead(patch, masking_utils, "find_packed_sequence_indices", sequences)


def _counting_padding(owner: Any) -> Callable[[pytest.MonkeyPatch], None]:
    def forward(usual, self, *args, position_ids=None, cache=None, **rest):
        decodes = cache is not None and cache.get_seq_length() > 0
        return usual(self, *args, position_ids=None if decodes else position_ids, cache=cache, **rest)

    return lambda patch: _instead(patch, owner, "forward", forward)


def _rotation_of_decode(factor: Callable[[torch.Tensor], Any], kind: str) -> Callable[[pytest.MonkeyPatch], None]:
    def forward(usual, self, x, position_ids):
        frequencies = self.inv_freq
        self.inv_freq = frequencies * factor(position_ids)
        angles = usual(self, x, position_ids)
        self.inv_freq = frequencies
        return angles

    owner = getattr(_modeling(kind), f"{kind.capitalize()}RotaryEmbedding")
    return lambda patch: _instead(patch, owner, "forward", forward)


def _reads_padding(kind: str) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(_modeling(kind), "apply_mask_to_padding_states", lambda states, mask: states)


def a_convolution_remembers_the_batch_before(patch):
    def forward(usual, self, hidden_states, *args, **rest):
        before = getattr(self, "before", 0.0)
        self.before = hidden_states.detach().mean((0, 1))
        return usual(self, hidden_states, *args, **rest) + before

    _instead(patch, _modeling("lfm2").Lfm2ShortConv, "forward", forward)


def the_state_moves_to_the_next_row(patch):
    owner = cache_utils.LinearAttentionLayer
    _instead(
        patch,
        owner,
        "update_recurrent_state",
        lambda usual, self, states, *args, **rest: usual(self, states.roll(1, 0), *args, **rest),
    )


def keys_stay_where_rows_are_reordered(patch):
    patch.setattr(cache_utils.DynamicLayer, "reorder_cache", lambda self, rows: None)


def states_keep_the_old_order(patch):
    def reorder(self, rows):
        for states in (self.conv_states, self.recurrent_states):
            states[0] = states[0][: len(rows)]

    patch.setattr(cache_utils.LinearAttentionCacheLayerMixin, "reorder_cache", reorder)


def the_window_of_the_cache_forgets_a_token_early(patch):
    def update(usual, self, keys, values, *args, **rest):
        entries = usual(self, keys, values, *args, **rest)
        if self.keys.shape[-2] == self.sliding_window - 1:
            self.keys[..., 0, :] = self.values[..., 0, :] = 0
        return entries

    _instead(patch, cache_utils.DynamicSlidingWindowLayer, "update", update)


def rows_read_the_keys_of_the_first(patch):
    def update(usual, self, *args, **rest):
        decodes = self.is_initialized
        entries = usual(self, *args, **rest)
        if not decodes:
            return entries
        return tuple(torch.cat([e[:1, :, :-1].expand(len(e), -1, -1, -1), e[:, :, -1:]], -2) for e in entries)

    _instead(patch, cache_utils.DynamicLayer, "update", update)


def every_layer_writes_to_the_first(patch):
    def init(usual, self, config, layer_idx):
        usual(self, config, layer_idx)
        self.layer_idx = 0

    _instead(patch, _modeling("llama").LlamaAttention, "__init__", init)


def a_convolution_moves_twice(patch):
    def update(usual, x, states, *args, **rest):
        output = usual(x, states, *args, **rest)
        states.copy_(states.roll(-1, -1))
        return output

    _instead(patch, _modeling("lfm2"), "causal_conv1d_update", update)


def _router(change: Callable[..., Any]) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: _instead(patch, _modeling("qwen3_moe").Qwen3MoeTopKRouter, "forward", change)


def _with_capacity(usual, self, states):
    logits, scores, experts = usual(self, states)
    scores = scores.clone()
    for expert in range(self.num_experts):
        late = (experts == expert).nonzero()[max(1, experts.numel() // self.num_experts) :]
        scores[late[:, 0], late[:, 1]] = 0
    return logits, scores, experts


def _over_the_batch(usual, self, states):
    logits, scores, experts = usual(self, states)
    return logits, scores * len(scores) * scores.softmax(0), experts


def scores_have_few_bits(patch):
    def forward(usual, self, *args, **rest):
        output = usual(self, *args, **rest)
        return (
            tuple(part.bfloat16().to(part.dtype) if part.is_floating_point() else part for part in output)
            if isinstance(output, tuple)
            else output.bfloat16().to(output.dtype)
        )

    _instead(patch, _modeling("deepseek_v3").DeepseekV3TopkRouter, "forward", forward)


def decode_leaves_out_the_scale(patch):
    def forward(usual, self, *args, cache=None, **rest):
        out = usual(self, *args, cache=cache, **rest)
        if cache is not None and out.logits.shape[1] == 1:
            out.logits = out.logits * self.config.logits_scaling
        return out

    _instead(patch, _modeling("granite").GraniteForCausalLM, "forward", forward)


def tied_though_the_configuration_says_apart(patch):
    def init(usual, self, config):
        usual(self, config)
        self.lm_head.weight = self.model.embed_tokens.weight

    _instead(patch, _modeling("llama").LlamaForCausalLM, "__init__", init)


def no_gradient_passes_a_checkpoint(patch):
    def enable(usual, self, *args, **rest):
        usual(self, *args, **rest)
        for module in self.modules():
            if hasattr(module, "_gradient_checkpointing_func"):
                module._gradient_checkpointing_func = lambda layer, states, *more: layer(states.detach(), *more)

    _instead(patch, PreTrainedModel, "gradient_checkpointing_enable", enable)


def a_layer_counts_its_calls(patch):
    def forward(usual, self, states):
        self.calls = getattr(self, "calls", 0) + 1
        return usual(self, states) * (1 + 0.1 * (self.calls % 2))

    _instead(patch, _modeling("qwen3").Qwen3MLP, "forward", forward)


def it_drops_without_training(patch):
    owner = _modeling("gpt2").GPT2MLP
    _instead(patch, owner, "forward", lambda usual, self, states: F.dropout(usual(self, states), 0.1, True))


BROKEN: dict[str, list[tuple[str, Callable[[Any], None]]]] = {
    "the same twice": [
        ("lfm2", a_convolution_remembers_the_batch_before),
        ("qwen3", a_layer_counts_its_calls),
        ("gpt2", it_drops_without_training),
        ("qwen3_moe", _router(lambda usual, self, states: usual(self, states + 0.3 * torch.randn_like(states)))),
    ],
    "causal": [
        ("llama", _sees_the_next_token),
        ("qwen3_moe", _router(_with_capacity)),
        ("qwen3_moe", _router(_over_the_batch)),
        ("mistral", _rotation_of_decode(lambda positions: 8.0 / (8.0 + positions.max()), "mistral")),
    ],
    "windows": [("mistral", _window_ignored("mistral")), ("qwen2/sliding", _window_ignored("qwen2"))],
    "prefill + decode = whole forward": [
        ("llama", _position_off_by_one),
        ("llama", _entry_overwritten),
        ("mistral", the_window_of_a_prompt_is_wider_than_its_cache),
        ("mistral", the_window_of_the_cache_forgets_a_token_early),
        ("llama", _rotation_of_decode(lambda positions: 0.5 if positions.shape[-1] == 1 else 1.0, "llama")),
        ("llama", every_layer_writes_to_the_first),
        ("lfm2", a_convolution_moves_twice),
        ("granite", decode_leaves_out_the_scale),
    ],
    "rows in one cache": [
        ("llama", keys_stay_where_rows_are_reordered),
        ("qwen3_5_text", states_keep_the_old_order),
        ("qwen3_5_text", the_state_moves_to_the_next_row),
        ("qwen3", rows_read_the_keys_of_the_first),
    ],
    "batch invariance": [
        ("llama", _mlp(lambda x: x + x.mean(0, keepdim=True))),
        ("llama", _mlp(lambda x: x + 0.3 * (x.roll(1, 0) - x))),
    ],
    "left = right padding": [
        ("qwen3", the_padding_mask_is_read_backwards),
        ("gpt2", _positions_ignored(_modeling("gpt2").GPT2Model)),
        ("lfm2", _reads_padding("lfm2")),
        ("qwen3_5_text", _reads_padding("qwen3_5")),
        ("falcon_h1", _reads_padding("falcon_h1")),
    ],
    "decode beside padding": [
        ("llama", _counting_padding(llama.LlamaModel)),
        ("qwen3_5_text", _counting_padding(_modeling("qwen3_5").Qwen3_5TextModel)),
    ],
    "packed = alone": [
        ("llama", _positions_ignored(llama.LlamaModel)),
        ("llama", only_the_first_packed_row_is_apart),
        ("falcon_h1", _state_across_packed_rows),
    ],
    "router": [
        ("mixtral", _mixtral_router(lambda states, weight: F.linear(states.bfloat16(), weight.bfloat16()).float())),
        ("mixtral", _mixtral_router(lambda states, weight: F.linear(states, weight).round())),
        ("deepseek_v3", scores_have_few_bits),
    ],
    "LM head": [
        ("llama", _another_weight_in_the_forward),
        ("llama", _never_tied),
        ("llama", tied_though_the_configuration_says_apart),
    ],
    "gradient checkpointing": [("llama", no_gradient_passes_a_checkpoint)],
}
QUICK = (
    "causal",
    "windows",
    "packed = alone",
    "prefill + decode = whole forward",
    "batch invariance",
    "router",
    "LM head",
)
TIED = (_another_weight_in_the_forward, _never_tied)


@pytest.mark.parametrize(
    ("line", "kind", "breaks"),
    [
        pytest.param(line, *case, marks=[pytest.mark.slow] * (place > 0 or line not in QUICK))
        for line in BROKEN
        for place, case in enumerate(BROKEN[line])
    ],
)
def test_a_broken_model_is_named_in_its_line(without_trl, monkeypatch, line, kind, breaks):
    config = zoo.tiny_config(kind, tie_word_embeddings=breaks in TIED)
    breaks(monkeypatch)
    _only(monkeypatch, line)
    named = next(row for row in examine(config) if row.name == line)
    assert named.wrong == [TRANSFORMERS]
    assert (named.finding.severity, named.finding.change) == (ERROR, KINDS[named.kind].change)


def _packing(patch: pytest.MonkeyPatch, convolution: bool, state: bool) -> list[Row]:
    """Qwen3.5 whose convolution or state begins anew with each packed row, as the fix of those bugs makes both do."""
    qwen, starts = _modeling("qwen3_5"), [0]

    def forward(usual, self, *args, position_ids=None, **rest):
        ends = position_ids is not None and position_ids.shape[0] == 1 and rest.get("cache") is None
        starts[:] = (position_ids[0] == 0).nonzero().flatten().tolist() if ends else [0]
        return usual(self, *args, position_ids=position_ids, **rest)

    def pieces(tensor: torch.Tensor, axis: int) -> list[torch.Tensor]:
        return list(tensor.tensor_split(starts[1:], axis))

    def convolve(usual, x, *args, **rest):
        return torch.cat([usual(piece, *args, **rest) for piece in pieces(x, -1)], -1)

    def scan(usual, query, key, value, g, beta, **rest):
        parts = zip(*(pieces(part, 1) for part in (query, key, value, g, beta)), strict=True)
        outputs = [usual(q, k, v, g=decay, beta=rate, **rest) for q, k, v, decay, rate in parts]
        return torch.cat([output for output, _ in outputs], 1), outputs[-1][1]

    _instead(patch, qwen.Qwen3_5TextModel, "forward", forward)
    if convolution:
        _instead(patch, qwen, "causal_conv1d_fn", convolve)
    if state:
        _instead(patch, qwen, "torch_chunk_gated_delta_rule", scan)
    return examine(zoo.tiny_config("qwen3_5_text"))


@pytest.mark.slow
def test_a_state_that_leaks_between_packed_rows_is_named(without_trl, monkeypatch):
    for convolution, state, lines in (
        (True, True, COMPARED),  # as NVIDIA-NeMo/Automodel#2147 mended both halves
        (False, False, COMPARED),  # modelscope/ms-swift#9565: rows of a pack see each other in linear attention
        (True, False, [PACKED]),  # THUDM/slime#1686: the convolution has the boundaries, the delta rule has not
        (False, True, [PACKED]),  # three tokens of a row are in the next convolution
    ):
        with monkeypatch.context() as patch:
            _only(patch, *lines)
            rows = _packing(patch, convolution, state)
        assert _wrong(rows) == ({} if convolution and state else {PACKED: [TRANSFORMERS]})
        [packed] = [row for row in rows if row.name == PACKED]
        assert not packed.wrong or packed.finding.change.startswith("do not pack rows (TRL: packing=False")


@pytest.mark.slow
def test_bugs_of_recurrent_states_are_named(without_trl, monkeypatch):
    qwen = _modeling("qwen3_5")

    def scan(usual, query, *args, g, chunk_size=64, **rest):
        """huggingface/transformers#46190, and of its cause #46873: the zeros that fill the last chunk of 64 update the
        state, so that a prompt leaves another than the whole row passes through."""
        output, state = usual(query, *args, g=g, chunk_size=chunk_size, **rest)
        filled = -query.shape[1] % chunk_size
        return output, None if state is None else state * (filled * g[:, -1]).exp()[..., None, None]

    def forgets(usual, *args, initial_state=None, **rest):
        """huggingface/transformers#45513: several tokens after a cache begin from an empty state."""
        return usual(*args, initial_state=None, **rest)

    for change, lines in ((scan, {"prefill + decode = whole forward"}), (forgets, {"prompt in pieces"})):
        with monkeypatch.context() as patch:
            _only(patch, *lines, "prefill + decode = whole forward")
            _instead(patch, qwen, "torch_chunk_gated_delta_rule", change)
            assert _wrong(examine(zoo.tiny_config("qwen3_5_text"))).keys() == lines
    # huggingface/transformers#48989: Nemotron-H reads a prompt with time steps of `time_step_min` at least.
    _only(monkeypatch, "short time steps", "prefill + decode = whole forward")
    rows = {row.name: row for row in examine(zoo.tiny_config("nemotron_h", time_step_min=0.001))}
    assert _wrong(rows.values()) == {"short time steps": [TRANSFORMERS]}
    assert "time_step_min" in rows["short time steps"].finding.change
    assert _wrong(examine(zoo.tiny_config("nemotron_h"))) == {}


@pytest.mark.parametrize(
    ("line", "template", "words"),
    [
        ("template", STEPS.replace("m.content", "loop.revindex|string + m.content") + BEGINS, "rewrites turns"),
        ("template", STEPS.replace("messages %", "messages[-1:] %") + BEGINS, "rewrites turns"),
        ("template", "{{ messages|length }}" + STEPS + BEGINS, "rewrites turns"),
        (
            "template",
            STEPS.replace("m.content", "('' if m.role == 'assistant' else m.content)") + BEGINS,
            "rewrites turns",
        ),
        ("template", STEPS.replace("m.content", "m.content.split()|join(' ')") + BEGINS, "loses spaces"),
        ("template", STEPS, "opens no answer: '<assistant>' is left to the model"),
        ("template", "{{ bos_token }}{{ bos_token }}" + STEPS + BEGINS, "begins twice with '<|end|>'"),
        ("template", "{% for m in messages %}{{ m.content }", "TemplateSyntaxError"),
        ("stop and pad", STEPS.replace("<|end|>", "</turn>") + BEGINS, "a turn ends with '<', and stops are '<|end|>'"),
        ("stop and pad", STEPS + BEGINS, "no stop token"),
        ("stop and pad", STEPS.replace("<|end|>", "") + BEGINS, "a turn of the template has no end"),
    ],
)
def test_a_broken_template_is_named_in_its_line(line, template, words):
    tokenizer = small_tokenizer(["2 + 2 = 4\n"], 272)
    tokenizer.bos_token, tokenizer.chat_template = tokenizer.eos_token, template
    tokenizer.eos_token = None if words == "no stop token" else tokenizer.eos_token
    named = next(row for row in examine_text(tokenizer, []) if row.name == line)
    assert named.values[TRANSFORMERS].startswith(words)
    assert named.wrong == [TRANSFORMERS]
    assert line != "template" or named.finding.change.startswith(
        ("mend chat_template.jinja", KINDS["chat-template"].change)
    )


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


def test_what_is_worth_knowing_of_a_template_is_said():
    tokenizer = small_tokenizer(["2 + 2 = 4\n"], 272)
    tokenizer.bos_token = tokenizer.eos_token
    tokenizer.chat_template = "{{ bos_token }}{{ strftime_now('%d %b %Y') }}" + STEPS + BEGINS
    row = examine_text(tokenizer, [])[0]
    assert (row.values["transformers"], row.wrong) == ("keeps turns", [])
    assert row.finding.change == "its prompt has the time of now: give date_string in data.chat_template_kwargs"
    begins = [(tokenizer.bos_token, tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|end|> $A", special_tokens=begins)
    assert examine_text(tokenizer, [])[0].finding.change.endswith(
        "add_special_tokens=False, else '<|end|>' comes twice"
    )


def test_a_folder_with_a_configuration_alone_has_no_tokenizer(tmp_path, monkeypatch):
    zoo.tiny_config("qwen3").save_pretrained(tmp_path)
    monkeypatch.setattr(check_module, "examine", lambda *_: [])
    monkeypatch.setattr(check_module, "reach_of_lora", lambda _: Row("LoRA"))
    template = check_module.check(str(tmp_path))[-1]
    assert template.values == {"transformers": "no tokenizer: its folder has none"}
    assert template.wrong == []


MANY = {"num_experts_per_tok": 8}  # of many experts: two of them are nearly tied for some token


@pytest.mark.parametrize(
    ("kind", "records", "experts"),
    [
        ("mixtral", False, {"num_local_experts": 64} | MANY),
        ("deepseek_v3", True, {"n_routed_experts": 64, "n_group": 1, "topk_group": 1} | MANY),
    ],
)
def test_experts_are_replayed_where_quartet_records_them(without_trl, monkeypatch, kind, records, experts):
    _only(monkeypatch)
    [flips] = [row for row in examine(zoo.tiny_config(kind, **experts)) if row.name == "router flips"]
    assert flips.values[TRANSFORMERS] != "0% of tokens"
    assert ("learner.routing_replay" in flips.finding.change) == records
    assert "dtype: float32" in flips.finding.change


def test_weights_that_config_json_contradicts_are_named(hf_policy, tmp_path, monkeypatch):
    monkeypatch.setattr(check_module, "examine", lambda *_: [])
    hf_policy("llama").save(tmp_path)
    assert [row.wrong for row in check_module.check(str(tmp_path)) if row.name == "weights"] == [[]]
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))
    [row] = [row for row in check_module.check(str(tmp_path)) if row.wrong]
    assert (row.name, row.wrong) == ("weights", ["quartet"])
    assert "an LM head that differs from the embedding; set it to false" in row.finding.change


def test_ids_that_the_embedding_has_not_and_letters_that_change_are_named():
    tokenizer = small_tokenizer(["2 + 2 = 4\n"], 272)
    row = examine_text(tokenizer, [], vocabulary=200)[1]
    assert "is not in the embedding, of 200 tokens" in row.values["transformers"]
    assert row.wrong
    assert "set vocab_size in config.json" in row.finding.change
    for change in (normalizers.Lowercase(), normalizers.Strip()):
        tokenizer.backend_tokenizer.normalizer = change
        assert examine_text(tokenizer, [], vocabulary=300)[1].wrong


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gemma3_text", "gpt2", "gpt_oss", "lfm2", "qwen3_5_text", "granite", "mamba2"])
def test_of_a_model_that_is_right_nothing_is_wrong_but_what_transformers_does_not_pack(without_trl, kind):
    wrong = _wrong(examine(zoo.tiny_config(kind)))
    assert wrong in ({}, {PACKED: [TRANSFORMERS]})


def test_layers_that_are_computed_again_drop_nothing(without_trl):
    """OPT drops in the layer itself, which checkpoints only in training mode."""
    assert _wrong(examine(zoo.tiny_config("opt"))) == {PACKED: [TRANSFORMERS]}


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
    assert all(finding["severity"] == NOTE for finding in written["findings"])
    assert [row["compared"] for row in written["tables"]["differences"]][-3:] == [
        "template",
        "round trip",
        "stop and pad",
    ]
    _only(monkeypatch, "prefill + decode = whole forward")
    _entry_overwritten(monkeypatch)
    assert main(["check", str(tmp_path / "model"), "--layers", "2"]) == 1
    shown = capsys.readouterr().out
    assert "WRONG" in shown
    assert "1. error prefill-decode-whole-forward: " in shown


def test_each_row_has_a_kind():
    names = {*COMPARED, *re.findall(r'Row\("([^"]+)"\)', inspect.getsource(check_module)), "own code"}
    assert {Row(name).kind for name in names} == {*sections()["Architectures"], "round-trip"}


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

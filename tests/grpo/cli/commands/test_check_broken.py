"""`quartet check` names what is wrong with models that are broken on purpose: kinds that were fixed before its lines
were written, and bugs of public trackers, planted as their text describes them."""

import importlib
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from tokenizers import normalizers
from tokenizers.processors import TemplateProcessing
from torch.nn import functional as F
from transformers import PreTrainedModel, cache_utils, masking_utils

from grpo.cli.commands import check as check_module
from grpo.cli.commands.check import WHAT_TO_DO, Row, examine, examine_text
from policies.presets import small_tokenizer

pytestmark = pytest.mark.slow
CHATML = "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '<|end|>\n' }}{% endfor %}"
BEGINS = "{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture(autouse=True)
def without_trl(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)


def _wrong(rows: list[Row]) -> set[str]:
    return {row.name for row in rows if row.wrong}


def _modeling(kind: str) -> Any:
    return importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")


def _instead(patch: pytest.MonkeyPatch, owner: Any, name: str, function: Callable[..., Any]) -> None:
    """Calls `function` with what it replaces first."""
    usual = getattr(owner, name)
    patch.setattr(owner, name, lambda *args, **rest: function(usual, *args, **rest))


# ---- masks -----------------------------------------------------------------------------------------------------------


def padding_is_seen(patch):
    _instead(
        patch,
        _modeling("llama"),
        "create_causal_mask",
        lambda usual, attention_mask=None, **rest: usual(attention_mask=None, **rest),
    )


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


# ---- positions -------------------------------------------------------------------------------------------------------


def learned_positions_are_ignored(patch):
    _instead(
        patch,
        _modeling("gpt2").GPT2Model,
        "forward",
        lambda usual, self, *args, position_ids=None, **rest: usual(self, *args, **rest),
    )


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


# ---- states ----------------------------------------------------------------------------------------------------------


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


# ---- caches ----------------------------------------------------------------------------------------------------------


def a_decoded_token_takes_the_last_place(patch):
    def update(usual, self, keys, values, *args, **rest):
        if self.is_initialized and keys.shape[-2] == 1:
            self.keys, self.values = self.keys[..., :-1, :], self.values[..., :-1, :]
        return usual(self, keys, values, *args, **rest)

    _instead(patch, cache_utils.DynamicLayer, "update", update)


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


# ---- routers ---------------------------------------------------------------------------------------------------------


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


# ---- LM heads and layers that are computed again ---------------------------------------------------------------------


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
        ("qwen3_moe", _router(_with_capacity)),
        ("qwen3_moe", _router(_over_the_batch)),
        ("mistral", _rotation_of_decode(lambda positions: 8.0 / (8.0 + positions.max()), "mistral")),
    ],
    "prefill + decode = whole forward": [
        ("mistral", the_window_of_a_prompt_is_wider_than_its_cache),
        ("mistral", the_window_of_the_cache_forgets_a_token_early),
        ("llama", _rotation_of_decode(lambda positions: 0.5 if positions.shape[-1] == 1 else 1.0, "llama")),
        ("llama", a_decoded_token_takes_the_last_place),
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
    "left = right padding": [
        ("llama", padding_is_seen),
        ("qwen3", the_padding_mask_is_read_backwards),
        ("gpt2", learned_positions_are_ignored),
        ("lfm2", _reads_padding("lfm2")),
        ("qwen3_5_text", _reads_padding("qwen3_5")),
        ("falcon_h1", _reads_padding("falcon_h1")),
    ],
    "decode beside padding": [
        ("llama", _counting_padding(_modeling("llama").LlamaModel)),
        ("qwen3_5_text", _counting_padding(_modeling("qwen3_5").Qwen3_5TextModel)),
    ],
    "packed = alone": [("llama", only_the_first_packed_row_is_apart)],
    "router": [("deepseek_v3", scores_have_few_bits)],
    "LM head": [("llama", tied_though_the_configuration_says_apart)],
    "gradient checkpointing": [("llama", no_gradient_passes_a_checkpoint)],
}


@pytest.mark.parametrize(("line", "kind", "breaks"), [(line, *case) for line in BROKEN for case in BROKEN[line]])
def test_a_broken_model_is_named_in_its_line(monkeypatch, line, kind, breaks):
    config = zoo.tiny_config(kind, tie_word_embeddings=False)
    breaks(monkeypatch)
    named = next(row for row in examine(config) if row.name == line)
    assert "transformers" in named.wrong
    assert named.advice == WHAT_TO_DO[line]


@pytest.mark.parametrize(
    "kind",
    ["qwen3", "gemma2", "gemma3_text", "qwen3_moe", "gpt2", "gpt_oss", "lfm2", "qwen3_5_text", "granite", "mamba2"],
)
def test_of_a_model_that_is_right_nothing_is_wrong_but_what_transformers_does_not_pack(kind):
    rows = examine(zoo.tiny_config(kind))
    assert _wrong(rows) <= {"packed = alone"}
    assert all(row.wrong in ([], ["transformers"]) for row in rows)


# ---- bugs of public trackers -----------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("convolution", "state", "bug"),
    [
        (False, False, "modelscope/ms-swift#9565: rows of a pack are visible to each other in linear attention"),
        (True, False, "THUDM/slime#1686: the convolution has the boundaries, the delta rule has not"),
        (
            False,
            True,
            "the first half of NVIDIA-NeMo/Automodel#2147: three tokens of a row are in the next convolution",
        ),
    ],
)
def test_a_state_that_leaks_between_packed_rows_is_named(monkeypatch, convolution, state, bug):
    rows = _packing(monkeypatch, convolution, state)
    assert _wrong(rows) == {"packed = alone"}
    packed = next(row for row in rows if row.name == "packed = alone")
    assert packed.wrong == ["transformers"]
    assert packed.advice.startswith("do not pack rows (TRL: packing=False")


def test_with_the_fix_of_automodel_2147_packed_rows_are_right(monkeypatch):
    assert _wrong(_packing(monkeypatch, convolution=True, state=True)) == set()


def test_the_padding_of_a_chunk_in_the_state_is_named(monkeypatch):
    """huggingface/transformers#46190, and of its cause #46873: the zeros that fill the last chunk of 64 update the
    state, so that a prompt leaves another than the whole row passes through."""

    def scan(usual, query, *args, g, chunk_size=64, **rest):
        output, state = usual(query, *args, g=g, chunk_size=chunk_size, **rest)
        filled = -query.shape[1] % chunk_size
        return output, None if state is None else state * (filled * g[:, -1]).exp()[..., None, None]

    _instead(monkeypatch, _modeling("qwen3_5"), "torch_chunk_gated_delta_rule", scan)
    assert "prefill + decode = whole forward" in _wrong(examine(zoo.tiny_config("qwen3_5_text")))


def test_a_second_piece_of_a_prompt_that_forgets_the_state_is_named(monkeypatch):
    """huggingface/transformers#45513: several tokens after a cache begin from an empty state."""
    qwen = _modeling("qwen3_5")
    _instead(
        monkeypatch,
        qwen,
        "torch_chunk_gated_delta_rule",
        lambda usual, *args, initial_state=None, **rest: usual(*args, initial_state=None, **rest),
    )
    assert _wrong(examine(zoo.tiny_config("qwen3_5_text"))) == {"prompt in pieces", "packed = alone"}


def test_time_steps_that_only_a_prompt_clamps_are_named():
    """huggingface/transformers#48989: Nemotron-H reads a prompt with time steps of `time_step_min` at least."""
    rows = {row.name: row for row in examine(zoo.tiny_config("nemotron_h", time_step_min=0.001))}
    steps = rows["short time steps"]
    assert "transformers" in steps.wrong
    assert "time_step_min" in steps.advice
    assert rows["prefill + decode = whole forward"].wrong == []
    assert "short time steps" not in _wrong(examine(zoo.tiny_config("nemotron_h")))


# ---- templates and tokenizers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (CHATML, "opens no answer: '<assistant>' is left to the model"),
        ("{{ bos_token }}{{ bos_token }}" + CHATML + BEGINS, "begins twice with '<|end|>'"),
        (CHATML.replace("messages %", "messages[-1:] %") + BEGINS, "rewrites turns"),
        ("{{ messages|length }}" + CHATML + BEGINS, "rewrites turns"),
        (CHATML.replace("m.content", "('' if m.role == 'assistant' else m.content)") + BEGINS, "rewrites turns"),
        ("{% for m in messages %}{{ m.content }", "TemplateSyntaxError"),
    ],
)
def test_a_broken_template_is_named(template, words):
    tokenizer = small_tokenizer(["2 + 2 = 4\n"], 272)
    tokenizer.bos_token, tokenizer.chat_template = tokenizer.eos_token, template
    row = examine_text(tokenizer, [])[0]
    assert row.values["transformers"].startswith(words)
    assert row.wrong
    assert row.advice.startswith("mend chat_template.jinja")


def test_what_is_worth_knowing_of_a_template_is_said():
    tokenizer = small_tokenizer(["2 + 2 = 4\n"], 272)
    tokenizer.bos_token = tokenizer.eos_token
    tokenizer.chat_template = "{{ bos_token }}{{ strftime_now('%d %b %Y') }}" + CHATML + BEGINS
    row = examine_text(tokenizer, [])[0]
    assert (row.values["transformers"], row.wrong) == ("keeps turns", [])
    assert row.advice == "its prompt has the time of now: give date_string in data.chat_template_kwargs"
    begins = [(tokenizer.bos_token, tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|end|> $A", special_tokens=begins)
    assert examine_text(tokenizer, [])[0].advice.endswith("add_special_tokens=False, else '<|end|>' comes twice")


def test_a_folder_with_a_configuration_alone_has_no_tokenizer(tmp_path, monkeypatch):
    zoo.tiny_config("qwen3").save_pretrained(tmp_path)
    monkeypatch.setattr(check_module, "examine", lambda *_: [])
    monkeypatch.setattr(check_module, "reach_of_lora", lambda _: Row("LoRA"))
    template = check_module.check(str(tmp_path))[-1]
    assert template.values == {"transformers": "no tokenizer: its folder has none"}
    assert template.wrong == []


def test_ids_that_the_embedding_has_not_and_letters_that_change_are_named():
    tokenizer = small_tokenizer(["2 + 2 = 4\n"], 272)
    row = examine_text(tokenizer, [], vocabulary=200)[1]
    assert "is not in the embedding, of 200 tokens" in row.values["transformers"]
    assert row.wrong
    assert "set vocab_size in config.json" in row.advice
    for change in (normalizers.Lowercase(), normalizers.Strip()):
        tokenizer.backend_tokenizer.normalizer = change
        assert examine_text(tokenizer, [], vocabulary=300)[1].wrong

"""Dense -> MLA: the stock DeepSeek-V3 forward must compute what the dense model computed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from dense_models import LENGTH, MAX_POSITIONS, ROPES, SHAPES, VOCABULARY, dense_model, random_ids, settings
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from policies.conversion import dense
from policies.conversion.dense import convert_checkpoint, convert_dense, new_folder
from policies.conversion.parity import ParityFailed, ParityReport, parity
from policies.conversion.supported import UnsupportedCheckpoint, check_convertible
from policies.layout import frozen_parameter_names
from policies.policy import PolicyError


def assert_same_function(dense: LlamaForCausalLM) -> DeepseekV3ForCausalLM:
    converted = convert_dense(dense)
    report = parity(dense, converted, random_ids(), new_tokens=6)
    assert report.passed, f"\n{report}"
    assert report.max_logit_difference < 1e-4 * report.max_logit  # ten times better than asked for
    assert report.top1_agreement == 1.0
    assert abs(report.kl_mean) < 1e-6
    assert report.num_tokens == 2 * LENGTH
    return converted


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_every_shape_gives_the_same_logits_and_text(shape: tuple[int, int, int, int], tied: bool) -> None:
    converted = assert_same_function(dense_model(shape, tie_word_embeddings=tied))
    assert type(converted) is DeepseekV3ForCausalLM
    assert not converted.training
    assert (converted.lm_head.weight is converted.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES.keys())
def test_fixed_rope_scalings_are_folded_into_the_factors(rope: dict) -> None:
    dense = dense_model(rope_parameters=dict(rope))
    plain = dense_model()
    ids = random_ids()
    assert (dense(ids).logits - plain(ids).logits).abs().max() > 0.1 * plain(ids).logits.abs().max()
    converted = assert_same_function(dense)
    frequencies = converted.model.rotary_emb.inv_freq, dense.model.rotary_emb.inv_freq.repeat(2)
    torch.testing.assert_close(*frequencies, rtol=2.0**-23, atol=0.0)  # one bit


def test_frequencies_do_not_come_from_a_buffer_that_was_cast() -> None:
    dense = dense_model()
    expected = dense.model.rotary_emb.inv_freq.clone()
    dense.bfloat16().float()
    assert not torch.equal(dense.model.rotary_emb.inv_freq, expected)
    assert torch.equal(convert_dense(dense).model.rotary_emb.inv_freq, expected.repeat(2))


@pytest.mark.parametrize("rank", [2, 16, 64, 192, 256, 320, 1024, 4096])
def test_the_constants_are_exact_in_bfloat16(rank: int) -> None:
    values = torch.tensor(dense._four_squares(rank + 4)) * dense.NORM_WEIGHT
    assert torch.equal(values.bfloat16().double(), values.double())
    assert values.double().square().sum() == (rank + 4) * dense.NORM_WEIGHT**2


def test_conversion_changes_neither_the_source_nor_the_random_state() -> None:
    dense = dense_model()
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    state = torch.get_rng_state()
    converted = convert_dense(dense)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.zero_()
    for name, tensor in dense.state_dict().items():
        assert torch.equal(tensor, before[name]), name


# What a test of parity is worth: it must fail when something is wrong.


def test_parity_notices_a_norm_that_was_trained() -> None:
    dense = dense_model()
    converted = convert_dense(dense)
    with torch.no_grad():
        converted.model.layers[1].self_attn.kv_a_layernorm.weight[:16].mul_(1.01)
    report = parity(dense, converted, random_ids(), new_tokens=2)
    assert not report.passed
    assert "FAILED" in str(report)


def test_parity_counts_rows_of_any_length_and_never_passes_nan() -> None:
    dense = dense_model()
    report = parity(dense, dense, [random_ids()[0, :5], random_ids()[0, :9]], new_tokens=2)
    assert (report.num_tokens, report.max_logit_difference, report.greedy_identical) == (14, 0.0, True)
    broken = convert_dense(dense)
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    assert not parity(dense, broken, [random_ids()[0, :5]], new_tokens=2).passed


def test_a_report_passes_within_a_thousandth_of_the_largest_logit() -> None:
    fields = {"kl_mean": 0.0, "top1_agreement": 1.0, "greedy_identical": True, "num_tokens": 1}
    assert ParityReport(max_logit_difference=0.02, max_logit=20.0, **fields).passed
    assert not ParityReport(max_logit_difference=0.021, max_logit=20.0, **fields).passed
    fields["greedy_identical"] = False
    assert not ParityReport(max_logit_difference=0.0, max_logit=20.0, **fields).passed


# Frozen parameters.


def frozen(model: torch.nn.Module, names: list[str]) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.endswith(tuple(names))}


def test_frozen_names_match_the_norm_and_the_bias_of_every_layer_and_nothing_else() -> None:
    converted = convert_dense(dense_model())
    listed = frozen_parameter_names(converted.config)
    ends = ("kv_a_layernorm.weight", "kv_a_proj_with_mqa.bias")
    assert frozen(converted, listed) == {f"model.layers.{i}.self_attn.{end}" for i in (0, 1) for end in ends}
    wrapped = get_peft_model(converted, LoraConfig(target_modules="all-linear", r=2))
    names = frozen(wrapped, listed)
    assert len(names) == 4
    assert not any("lora" in name for name in names)
    assert frozen_parameter_names(dense_model().config) == []


# Refusals.


def roped(**rope: object) -> LlamaConfig:
    return LlamaConfig(**settings(rope_parameters={"rope_theta": 1e4, "factor": 2.0} | rope))


LONG_ROPE = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 32}
INEXACT = [
    (Qwen2Config(), "model_type='qwen2'.*biases"),
    (Qwen3Config(), "model_type='qwen3'.*q_norm, k_norm"),
    (SmolLM3Config(), "model_type='smollm3'.*no rotary embedding"),
    (LlamaConfig(**settings(attention_bias=True)), "attention_bias=True"),
    (LlamaConfig(**settings(mlp_bias=True)), "mlp_bias=True"),
    (LlamaConfig(**settings(hidden_act="gelu")), "hidden_act='gelu'"),
    (LlamaConfig(**settings((4, 3, 8, 32))), "num_key_value_heads=3"),
    (LlamaConfig(**settings((4, 2, 3, 32))), "head_dim=3"),
    (MistralConfig(**settings(sliding_window=16)), "sliding_window=16.*max_position_embeddings=64"),
    (LlamaConfig(**settings(quantization_config={"quant_method": "gguf"})), "quantization_config"),
    (roped(rope_type="dynamic"), "rope_type='dynamic'.*default, linear, llama3, yarn"),
    (roped(rope_type="longrope", **LONG_ROPE), "rope_type='longrope'"),
    (roped(rope_type="linear", partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
]


def test_what_cannot_be_exact_is_refused_by_name() -> None:
    check_convertible(MistralConfig(**settings(sliding_window=MAX_POSITIONS)))  # a window that never acts
    for config, named in INEXACT:
        with pytest.raises(UnsupportedCheckpoint, match=named):
            check_convertible(config)


def test_wrapped_headless_and_rounded_models_are_refused_by_name() -> None:
    wrapped = get_peft_model(dense_model(), LoraConfig(target_modules=["q_proj"], r=2))
    for model, words in (
        (wrapped, r"PeftModel.*merge adapters"),
        (LlamaForSequenceClassification(LlamaConfig(**settings())), "LlamaForSequenceClassification"),
        (dense_model().bfloat16(), r"embed_tokens\.weight\.dtype=torch\.bfloat16.*dtype=torch\.float32"),
    ):
        with pytest.raises(UnsupportedCheckpoint, match=words):
            convert_dense(model)


def test_longrope_is_carried_where_its_factors_never_change() -> None:
    factors = [1.0, 2.0, 3.0, 4.0]
    rope = {"rope_type": "longrope", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32}
    dense = dense_model(rope_parameters=rope | {"short_factor": factors, "long_factor": factors})
    assert dense.model.rotary_emb.attention_scaling > 1.1  # and so is its factor on cos and sin
    assert_same_function(dense)


# Checkpoints on disk.

TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<unk>": 1, "<eos>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    folder = tmp_path / "in" / "dense"
    dense = dense_model(tie_word_embeddings=True, eos_token_id=2)
    dense.generation_config.temperature = 0.7
    dense.generation_config.do_sample = True
    dense.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "LICENSE").write_text("do as you like")
    return folder


PROMPTS = [" ".join(f"w{7 * i * i % 95 + 3}" for i in range(50)), "w5 w9 w31"]


def test_a_converted_checkpoint_loads_in_stock_transformers(source: Path, tmp_path: Path) -> None:
    destination = tmp_path / "out" / "mla"
    report = convert_checkpoint(str(source), destination, prompts=PROMPTS)
    assert report.passed
    assert report.num_tokens == 53
    assert [path.name for path in destination.parent.iterdir()] == ["mla"]

    loaded = AutoModelForCausalLM.from_pretrained(destination)
    assert type(loaded) is DeepseekV3ForCausalLM
    assert loaded.config.num_nextn_predict_layers == 0
    assert len(frozen(loaded, frozen_parameter_names(loaded.config))) == 4
    assert (loaded.generation_config.temperature, loaded.generation_config.eos_token_id) == (0.7, 2)
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    ids = random_ids()
    assert torch.equal(loaded(ids).logits, convert_dense(dense)(ids).logits)

    tokenizer = AutoTokenizer.from_pretrained(destination)
    assert (tokenizer.chat_template, tokenizer.eos_token_id, tokenizer.pad_token_id) == (TEMPLATE, 2, 0)
    assert tokenizer("w5 w9 w31").input_ids == [5, 9, 31]
    assert (destination / "LICENSE").read_text() == "do as you like"
    assert json.loads((destination / "config.json").read_text())["quartet_exact_mla"] is True
    assert {path.suffix for path in destination.iterdir()} <= {".json", ".jinja", ".safetensors", ""}


def test_a_destination_that_is_not_empty_or_cannot_be_written_is_refused_before_anything_is_read(
    tmp_path: Path,
) -> None:
    with pytest.raises(FileExistsError, match=r"not empty"), new_folder(Path(__file__).parent):
        raise AssertionError
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match=r"destination='.*file/mla' cannot be written.*name another"):
        convert_checkpoint("no/such/model", tmp_path / "file" / "mla")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError, match="link"), new_folder(tmp_path / "link"):
        raise AssertionError


def test_a_damaged_source_and_a_conversion_without_parity_leave_nothing_behind(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "NORM_WEIGHT", 0.5)  # too weak to cancel the norm
    with pytest.raises(ParityFailed, match="max logit difference"):
        convert_checkpoint(str(source), tmp_path / "out" / "mla", prompts=PROMPTS)
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(PolicyError, match=r"model\.safetensors \([\d,]+ bytes\) is damaged"):
        convert_checkpoint(str(source), tmp_path / "out" / "mla", prompts=PROMPTS)
    assert list((tmp_path / "out").iterdir()) == []

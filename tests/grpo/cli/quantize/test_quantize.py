"""`quartet quantize`: the files that it writes, what reads them, its report, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import zoo
from rich.console import Console
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    DeepseekV3Config,
    LlamaConfig,
    LlamaForCausalLM,
    XLNetConfig,
)

from grpo.cli.parse import main
from grpo.cli.quantize import compressor
from grpo.cli.quantize import quantize as quantize_command
from grpo.cli.quantize.options import QuantizeConfig
from grpo.cli.quantize.quantize import REPORT, Quantizer
from grpo.data.calibration_text import calibration_text
from policies import presets
from policies.contradictions import contradictions
from policies.conversion.dense import convert_checkpoint
from policies.files import packed
from policies.policy import Policy, PolicyError
from rewards.data.word_problems import word_problems

SIZES = ["--calibrate_tokens", "256", "--held_out_tokens", "128", "--threads", "1", "--device", "cpu"]
CORPUS = [f"{row['question']}\n{row['answer']}\n" for row in word_problems("train", [1], count=100)]
PACKED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"weights": {"num_bits": 4, "symmetric": True}, "input_activations": None}},
}


@pytest.fixture(autouse=True)
def short_windows(monkeypatch) -> None:
    monkeypatch.setattr(quantize_command, "WINDOW", 32)


@pytest.fixture(scope="module")
def source(tmp_path_factory, micro_preset) -> str:
    """A policy with experts whose rows are whole groups, and a draft head."""
    folder = tmp_path_factory.mktemp("quantize") / "policy"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(presets.PRESETS, "micro32", {**presets.PRESETS[micro_preset], "moe_intermediate_size": 32})
        presets.build("micro32", CORPUS, 3).save(folder)
    (folder / "LICENSE").write_text("do as you like")
    return str(folder)


@pytest.fixture
def quantize(source, tmp_path) -> Callable[..., Path]:
    pytest.importorskip("llmcompressor")

    def run(*options: str, model: str = source, calibrate: str = "word_problems") -> Path:
        assert main(["quantize", model, str(tmp_path / "out"), "--calibrate", calibrate, *SIZES, *options]) == 0
        return tmp_path / "out"

    return run


def refused(capfd, *arguments: str) -> str:
    assert main(["quantize", *arguments, *SIZES]) != 0
    return capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_transformers_and_quartet_read_the_same_numbers(quantize, source, method):
    folder = quantize("--method", method)
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)(CORPUS[0]).input_ids])
    small, original = Policy.load(folder), Policy.load(source)
    stock, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"]
    assert torch.equal(stock(ids).logits, small.trunk(ids).logits)
    assert 1e-3 < (small.trunk(ids).logits - original.trunk(ids).logits).abs().mean() < 2
    assert getattr(small.config, "quantization_config", None) is None  # it is saved as an ordinary policy
    for own, other in zip(small.mtp.parameters(), original.mtp.parameters(), strict=True):
        assert torch.equal(own, other)
    names = {name for file in folder.glob("*.safetensors") for name in safe_open(file, "pt").keys()}  # noqa: SIM118
    assert "model.layers.1.mlp.experts.3.down_proj.weight_packed" in names
    assert "model.layers.2.eh_proj.weight" in names
    assert (folder / "LICENSE").read_text() == "do as you like"
    report = json.loads((folder / REPORT).read_text())
    assert report["weights_bytes"]["after"] < report["weights_bytes"]["before"]
    assert 0 < report["held_out"]["top1_agreement"] < 1
    assert report["matrices_kept"] == [f"model.layers.{layer}.{name}" for layer, name in KEPT]


KEPT = [
    *((0, name) for name in ("self_attn.kv_b_proj", "self_attn.o_proj", "mlp.down_proj")),
    *((1, name) for name in ("self_attn.kv_b_proj", "self_attn.o_proj")),
]


@pytest.mark.slow
def test_accuracy_is_measured_before_and_after_by_the_scorer_of_eval(quantize, capsys):
    folder = quantize(
        *(
            "--method",
            "rtn",
            "--bits",
            "8",
            "--data",
            "word_problems",
            "--eval.limit",
            "3",
            "--rollout.max_completion_tokens",
            "4",
        )
    )
    accuracy = json.loads((folder / REPORT).read_text())["accuracy"]
    assert "accuracy" in json.dumps(accuracy)
    assert "interval_95" in json.dumps(accuracy)
    assert str(folder) in json.dumps(accuracy)
    assert "problem by problem" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("converted", [False, True])
def test_a_llama_as_it_comes_and_as_mla(quantize, tmp_path, converted):
    """The exact MLA form rotates by transformers' longrope."""
    torch.manual_seed(0)
    tokenizer = presets.small_tokenizer(CORPUS, 300)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    model = tmp_path / "llama"
    if converted:
        convert_checkpoint(str(model), model := tmp_path / "mla")
    folder = quantize("--method", "gptq" if converted else "awq", model=str(model))
    ids = torch.tensor([[5, 6, 7, 8]])
    stock = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(stock(ids).logits, Policy.load(folder).trunk(ids).logits)
    with pytest.raises(PolicyError, match="is quantised already"):
        Policy.load(folder, in_4_bits=True)


def test_the_report_is_of_other_text_than_the_calibration(source):
    tokenizer = AutoTokenizer.from_pretrained(source)
    text = calibration_text("word_problems", tokenizer, tokens=256, held_out_tokens=128, window=32)
    assert not {tuple(w.tolist()) for w in text.windows} & {tuple(w.tolist()) for w in text.held_out}


def test_a_model_without_a_limit_of_its_context_is_measured_on_whole_windows(monkeypatch, source):
    monkeypatch.setattr(quantize_command, "read_config", lambda base: XLNetConfig())
    config = QuantizeConfig(model=source, calibrate="word_problems", calibrate_tokens=256, held_out_tokens=128)
    text = Quantizer(config, Console())._text()
    assert {len(window) for window in [*text.windows, *text.held_out]} == {32}


def test_a_missing_package_is_named_before_anything_is_loaded(monkeypatch, capfd, source, tmp_path):
    monkeypatch.setattr(compressor, "find_spec", lambda name: None)
    said = refused(capfd, source, str(tmp_path / "out"), "--calibrate", "word_problems")
    assert "pip install 'quartet-rl[quantize]'" in said
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(packed, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"model='some' holds quantised weights.*quartet-rl\[quantize\]"):
        packed.loading("some")


def test_packed_weights_that_would_be_read_as_others_are_refused():
    """transformers drops what it does not multiply out, silently."""
    symmetric = {"weights": {"symmetric": True}}
    few = symmetric | {"input_activations": {"num_bits": 8}}
    for given, why in (
        ({"format": "int-quantized"}, "format='int-quantized', and pack-quantized alone is read"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme is set"),
        ({"config_groups": {"a": symmetric | {"input_activations": {}}, "b": few}}, "activations have few bits"),
        ({"config_groups": {"a": {"weights": {"symmetric": False}}}}, "zero points of routed experts"),
    ):
        for shape in (DeepseekV3Config, LlamaConfig):
            assert packed.unreadable(shape(quantization_config=PACKED)) is None
            config = shape(quantization_config=PACKED | given)
            assert any(why in fault for fault in contradictions(config))


@pytest.mark.usefixtures("without_packages")
def test_problems_that_are_calibrated_on_are_not_evaluated(capfd, source, tmp_path):
    """Found before anything is quantised; the share that a run holds out is not read at all."""
    rows = [{"question": f"{a} + {b} = ?", "answer": f"#### {a + b}"} for a in range(30) for b in range(30)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = str(tmp_path / "own.jsonl")
    said = refused(
        capfd,
        source,
        str(tmp_path / "out"),
        "--calibrate",
        data,
        "--data",
        data,
        "--eval.split",
        "train",
        "--eval.limit",
        "8",
    )
    assert "8 of 8 problems that are to be evaluated were trained on" in said
    tokenizer = AutoTokenizer.from_pretrained(source)
    sizes = {"tokens": 10**5, "held_out_tokens": 64, "window": 32}
    whole = calibration_text(data, tokenizer, **sizes).examples
    left = calibration_text(data, tokenizer, left_out=lambda example: "7" in example.question, **sizes).examples
    assert [e.question for e in left] == [e.question for e in whole if "7" not in e.question]
    assert 0 < len(left) < len(whole)


@pytest.fixture
def without_packages(monkeypatch) -> None:
    """What is refused before the packages are used."""
    monkeypatch.setattr(compressor, "find_spec", lambda name: object())


@pytest.mark.usefixtures("without_packages")
def test_evaluation_data_and_a_quantised_source_are_refused(capfd, source, tmp_path):
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": "2 + 3 = ?", "answer": "5"}) + "\n")
    (tmp_path / "test.txt").write_text("2 + 3 = 5\n" * 4000)
    for name in ("test.jsonl", "test.txt"):
        said = refused(capfd, source, str(tmp_path / "out"), "--calibrate", str(tmp_path / name))
        assert "is for evaluation and must not be trained on" in said
    config = json.loads((Path(source) / "config.json").read_text())
    copy = shutil.copytree(source, tmp_path / "copy")
    (copy / "config.json").write_text(json.dumps(config | {"quantization_config": PACKED}))
    said = refused(capfd, str(copy), str(tmp_path / "out"), "--calibrate", "word_problems")
    assert "is quantised already; name the policy that it was made from" in said


@pytest.mark.usefixtures("without_packages")
def test_a_model_that_reads_pictures_keeps_their_files(tmp_path, monkeypatch):
    """Its context is that of its part that writes; without its processor's files it would not be loaded."""
    model = AutoModelForImageTextToText.from_config(zoo.tiny_config("gemma3"), dtype=torch.float32)
    model.save_pretrained(tmp_path / "model")
    zoo.policy("llama").tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model/preprocessor_config.json").write_text("{}")
    monkeypatch.setattr(compressor, "quantize", lambda *_, **__: {})
    monkeypatch.setattr(quantize_command, "metadata", SimpleNamespace(version=lambda package: "0"))
    words = ["quantize", str(tmp_path / "model"), str(tmp_path / "out"), "--calibrate", "word_problems", *SIZES]
    assert main(words) == 0
    assert (tmp_path / "out/preprocessor_config.json").read_text() == "{}"
    (tmp_path / "plain").touch()
    mode = (tmp_path / "plain").stat().st_mode
    assert all(file.stat().st_mode == mode for file in (tmp_path / "out").iterdir())


@pytest.mark.slow
def test_experts_in_two_precisions_are_refused(capfd, source, tmp_path):
    """transformers would not read them."""
    pytest.importorskip("llmcompressor")
    said = refused(capfd, source, str(tmp_path / "out"), "--calibrate", "word_problems", "--group_size", "64")
    assert "group_size=64 does not divide the rows of the routed experts, 32 numbers" in said
    assert not (tmp_path / "out").exists()

"""`quartet quantize`: the files that it writes, what reads them, its report, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from grpo.cli import main
from grpo.data.calibration_text import calibration_text
from grpo.data.word_problems import word_problems
from grpo.quantize import compressor
from grpo.quantize.report import REPORT
from policies import presets
from policies.files import packed
from policies.policy import Policy, PolicyError

SIZES = ["--window", "32", "--calibrate_tokens", "256", "--heldout_tokens", "128", "--threads", "1", "--device", "cpu"]
CORPUS = [f"{row['question']}\n{row['answer']}\n" for row in word_problems("train", [1], count=100)]


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
    assert 0 < report["heldout"]["top1_agreement"] < 1
    assert report["matrices_kept"] == [f"model.layers.{layer}.{name}" for layer, name in KEPT]


KEPT = [
    *((0, name) for name in ("self_attn.kv_b_proj", "self_attn.o_proj", "mlp.down_proj")),
    *((1, name) for name in ("self_attn.kv_b_proj", "self_attn.o_proj")),
]


@pytest.mark.slow
def test_accuracy_is_measured_before_and_after_by_the_scorer_of_eval(quantize, capsys):
    folder = quantize(
        *("--method", "rtn", "--bits", "8", "--data", "word_problems", "--limit", "3", "--max_completion_tokens", "4")
    )
    accuracy = json.loads((folder / REPORT).read_text())["accuracy"]
    assert "accuracy" in json.dumps(accuracy)
    assert "interval_95" in json.dumps(accuracy)
    assert str(folder) in json.dumps(accuracy)
    assert "problem by problem" in capsys.readouterr().out


@pytest.mark.slow
def test_a_dense_llama(quantize, tmp_path):
    torch.manual_seed(0)
    tokenizer = presets.small_tokenizer(CORPUS, 300)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    folder = quantize("--method", "awq", model=str(tmp_path / "llama"))
    ids = torch.tensor([[5, 6, 7, 8]])
    stock = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(stock(ids).logits, Policy.load(folder).trunk(ids).logits)
    with pytest.raises(PolicyError, match="is quantised already"):
        Policy.load(folder, in_4_bits=True)


def test_the_report_is_of_other_text_than_the_calibration(source):
    tokenizer = AutoTokenizer.from_pretrained(source)
    text = calibration_text("word_problems", tokenizer, tokens=256, heldout_tokens=128, window=32)
    assert not {tuple(w.tolist()) for w in text.windows} & {tuple(w.tolist()) for w in text.heldout}


def test_a_missing_package_is_named_before_anything_is_loaded(monkeypatch, capfd, source, tmp_path):
    monkeypatch.setattr(compressor, "find_spec", lambda name: None)
    said = refused(capfd, source, str(tmp_path / "out"), "--calibrate", "word_problems")
    assert "pip install 'quartet-rl[quantize]'" in said
    assert not (tmp_path / "out").exists()


def test_packed_weights_name_what_they_need(monkeypatch):
    monkeypatch.setattr(packed, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"model='some' holds quantised weights.*quartet-rl\[quantize\]"):
        packed.loading("some")


@pytest.fixture
def without_packages(monkeypatch) -> None:
    """What is refused before the packages are used."""
    monkeypatch.setattr(compressor, "find_spec", lambda name: object())


@pytest.mark.usefixtures("without_packages")
def test_evaluation_data_and_a_quantised_source_are_refused(capfd, source, tmp_path):
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": "2 + 3 = ?", "answer": "5"}) + "\n")
    said = refused(capfd, source, str(tmp_path / "out"), "--calibrate", str(tmp_path / "test.jsonl"))
    assert "test.jsonl" in said
    config = json.loads((Path(source) / "config.json").read_text())
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in Path(source).iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "compressed-tensors"}})
    )
    said = refused(capfd, str(copy), str(tmp_path / "out"), "--calibrate", "word_problems")
    assert "is quantised already; name the policy that it was made from" in said


@pytest.mark.slow
def test_experts_in_two_precisions_are_refused(capfd, source, tmp_path):
    """transformers would not read them."""
    pytest.importorskip("llmcompressor")
    said = refused(capfd, source, str(tmp_path / "out"), "--calibrate", "word_problems", "--group_size", "64")
    assert "group_size=64 does not divide the rows of the routed experts, 32 numbers" in said
    assert not (tmp_path / "out").exists()

"""The benchmarks of the policy: their decoders compute what the models compute, and they say what they measured."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from policies.anatomy import anatomy
from policies.policy import Policy

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """`benchmark(name)`: a module of the folder, which is no package."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(FOLDER)])
    return importlib.import_module


def _llama(heads: int, groups: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=groups, max_position_embeddings=32, initializer_range=0.3, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def _decoded(decoder, token_ids: torch.Tensor) -> torch.Tensor:
    decoder.start(rows=len(token_ids), context=0, room=token_ids.shape[1])
    return torch.stack([decoder.step(column) for column in token_ids.T], dim=1)


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (4, 1)])
def test_the_multi_head_decoder_computes_llama(benchmark, heads, groups):
    model, token_ids = _llama(heads, groups), torch.randint(50, (3, 9))
    decoder = benchmark("multi_head_decoder").MultiHeadDecoder(model, torch.float32, 32)
    with torch.no_grad():
        expected = model(token_ids).logits
    torch.testing.assert_close(_decoded(decoder, token_ids), expected, rtol=0, atol=1e-4)


def test_the_latent_decoder_computes_the_policy(benchmark, random_policy):
    policy, token_ids = random_policy(2), torch.randint(2, 200, (3, 9))
    decoder = benchmark("decoding").decoder_of(policy, torch.float32, 32)
    with torch.no_grad():
        expected = policy.trunk(token_ids).logits
    torch.testing.assert_close(_decoded(decoder, token_ids), expected, rtol=0, atol=1e-4)


def test_bytes_and_flops_of_a_step_by_hand(benchmark, random_policy):
    decoding = benchmark("decoding")
    decoder = decoding.MultiHeadDecoder(_llama(4, 2), torch.float32, 32)
    layer = (32 + 2 * 16) * 32 + 32 * 32 + 3 * 32 * 48 + 2 * 32  # q, k, v, o, the feed-forward, two norms
    weights = 4 * (2 * layer + 50 * 32 + 32)
    assert decoding.weight_bytes(decoder) == weights
    [point] = decoding.measure({"it": decoder}, [(3, 16)], steps=2, warm_up=1, rounds=1)["it"]
    assert point["bytes_read_per_token"] == weights / 3 + 16 * 4 * 2 * 2 * 16
    attended = 16 + 4  # and what a warm-up, two steps and the counted one have added
    expected = 2 * (2 * (layer - 64) + 50 * 32) + 2 * 2 * 2 * 4 * 8 * attended
    assert point["flops_per_token"] == expected
    assert point["tokens_per_second"] == pytest.approx(3e3 / point["ms"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dense", [True, False])
def test_flops_are_those_that_the_policy_inspection_counts(benchmark, random_policy, dense, dtype):
    """Two ways to the same number: torch's counter over what ran, and the formula over the configuration."""
    decoding = benchmark("decoding")
    model = random_policy(2, mtp=False, first_k_dense_replace=2).trunk if dense else _llama(4, 2)
    policy = Policy(model, None, None)
    decoder = decoding.decoder_of(policy, dtype, 32)
    [point] = decoding.measure({"it": decoder}, [(3, 16)], steps=2, warm_up=1, rounds=1)["it"]
    expected = anatomy(model.config, 0, context=16 + 3, lora_rank=1, lora_alpha=1.0).decode_flops
    assert point["flops_per_token"] == expected


def test_rounds_are_merged_by_their_medians(benchmark):
    rounds = [
        {"a": 1.0, "points": [{"ms": 3.0}]},
        {"a": 2.0, "points": [{"ms": 9.0}]},
        {"a": 9.0, "points": [{"ms": 4.0}]},
    ]
    assert benchmark("policy").merged(rounds) == {"a": 2.0, "points": [{"ms": 4.0}]}


def test_rows_learn_every_token_but_the_first(benchmark):
    pretraining = benchmark("pretraining")
    text = pretraining.load_text(None, 300, 16, seed=0, documents=40)
    batch = text.batch(step=2, size=3)
    assert [row.prompt_token_ids + row.samples[0].token_ids for row in batch] == text.train[3:6].tolist()
    assert {len(row.prompt_token_ids) for row in batch} == {1}
    last = len(text.train) // 3 + 1
    assert len(text.batch(last, 3)) == 3  # the epoch starts again


def test_perplexity_and_activation_rates_are_those_of_the_stock_model(benchmark, random_policy):
    pretraining = benchmark("pretraining")
    policy, blocks = random_policy(1, mtp=False), torch.randint(2, 200, (5, 12))
    with torch.no_grad():
        out = policy.trunk(blocks, labels=blocks)
    assert pretraining.perplexity(policy, blocks, 24) == pytest.approx(out.loss.exp().item(), rel=1e-4)
    rates = pretraining.activation_rates(policy, blocks, 2)
    assert rates.shape == (1, 4)
    assert rates.sum().item() == pytest.approx(2)


def test_bad_options_are_refused_before_anything_runs(benchmark, tmp_path, capsys, monkeypatch):
    for given, message in (
        (["--json", str(tmp_path / "no/x.json")], "there is no folder"),
        (["--data", str(tmp_path)], "there is no train.jsonl in it"),
        (["--steps", "0"], "use 1 or more"),
    ):
        monkeypatch.setattr(sys, "argv", ["policy.py", *given])
        with pytest.raises(SystemExit):
            benchmark("policy").main()
        assert message in capsys.readouterr().err


def test_without_models_part_c_is_skipped_with_a_reason_and_the_file_names_its_machine(
    benchmark, tmp_path, monkeypatch
):
    file = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["policy.py", "--part", "c", "--models", str(tmp_path), "--json", str(file)])
    benchmark("policy").main()
    record = json.loads(file.read_text())
    assert "make smollm2" in record["c"]["skipped"]
    assert {"hardware", "versions", "command"} <= record["environment"].keys()


@pytest.mark.long
@pytest.mark.slow
def test_parts_a_and_b_run(tmp_path):
    file = tmp_path / "out.json"
    command = [sys.executable, str(FOLDER / "policy.py"), "--quick", "--part", "a", "--part", "b", "--json", str(file)]
    subprocess.run(command, check=True, capture_output=True)
    record = json.loads(file.read_text())
    mha, mla = (record["a"]["models"][name] for name in ("mha", "mla"))
    assert mla["cache_bytes_per_token"] / mha["cache_bytes_per_token"] == pytest.approx(0.07, abs=0.005)
    moe, same, active = (
        record["b"]["seeds"]["0"]["models"][f] for f in ("moe", "dense_same_parameters", "dense_same_flops")
    )
    assert moe["parameters"] == pytest.approx(same["parameters"], rel=0.01)
    assert moe["active_parameters"] == pytest.approx(active["parameters"], rel=0.01)
    assert "perplexity" not in same


def test_models_of_equal_quality_have_equal_sizes_but_for_their_caches(benchmark):
    module = benchmark("equal_quality")
    heads, mla = (
        anatomy(module.config_of(model, 500), 0, context=1024, lora_rank=2, lora_alpha=4.0) for model in module.MODELS
    )
    assert mla.parameters == pytest.approx(heads.parameters, rel=0.01)
    assert heads.cache_numbers / mla.cache_numbers == pytest.approx(768 / 144)
    assert module.crossing([1024.0, 2048.0, 4096.0], [10.7, 8.7, 6.7]) == {
        "per_doubling": -2.0,
        "tokens_at_aim": 11585.2,
    }
    assert module.crossing([1024.0, 2048.0], [9.0, 10.0]) == {"per_doubling": 1.0, "tokens_at_aim": None}
    assert module.crossing([1024.0, 2048.0], [9.0, 9.0]) == {"per_doubling": 0.0, "tokens_at_aim": None}
    assert module.crossing([1024.0], [9.0]) == {"per_doubling": 0.0, "tokens_at_aim": None}


def test_the_balance_benchmark_measures_what_it_prints(benchmark, tmp_path, monkeypatch, capsys):
    file = tmp_path / "out.json"
    monkeypatch.setattr(
        sys, "argv", ["balance.py", "--quick", "--json", str(file), "--mechanism", "none", "--mechanism", "all"]
    )
    benchmark("balance").main()
    record = json.loads(file.read_text())
    assert {"hardware", "versions", "command"} <= record["environment"].keys()
    found = record["seeds"]["0"]
    assert list(found) == ["none", "all"]
    shown = capsys.readouterr().out
    for name, result in found.items():
        low, high = (f"{result[end]:.1%}" for end in ("lowest", "highest"))
        assert re.search(rf"^{name} +0 +{low} +{high} +(yes|no) ", shown, re.M)
        assert [len(layer) for layer in result["rates"]] == [8, 8]  # two MoE layers
        assert [sum(layer) for layer in result["rates"]] == pytest.approx([4, 4], abs=1e-3)  # k of every token
        assert result["inside_aim"] == (result["lowest"] >= 0.45 and result["highest"] <= 0.55)


@pytest.mark.long
@pytest.mark.slow
def test_half_of_the_experts_each_with_the_bias_and_not_without(benchmark):
    """k/E = ½ from scratch: every expert's activation rate is inside 45 to 55 %, and without balancing it is not."""
    found = benchmark("balance").measure(["none", "bias"], steps=60, seed=0)
    assert found["bias"]["inside_aim"]
    assert found["none"]["lowest"] < 0.4
    assert found["none"]["highest"] > 0.6

"""`quartet serve --backend vllm`: what is refused before anything is loaded."""

import re

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from grpo.cli.parse import main
from policies.conversion.dense import convert_checkpoint
from policies.policy import Policy
from policies.presets import small_tokenizer


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "backend=vllm: there is no interpreter nowhere/python .* `make vllm`"),
        (["--rollout.margin", "2"], "rollout.margin=2.0 is for backend=native"),
        (["--replicas", "2"], "replicas=2 is for backend=native"),
        (["--follow"], "--follow is for backend=native"),
    ],
)
def test_what_vllm_does_not_do_is_refused_before_anything_is_loaded(
    random_policy, tmp_path, capsys, monkeypatch, options, said
):
    monkeypatch.setenv("QUARTET_VLLM_PYTHON", "nowhere/python")
    random_policy(3).save(tmp_path / "micro")
    assert main(["serve", str(tmp_path / "micro"), "--backend", "vllm", "--port", "0", *options])
    error = capsys.readouterr().err
    assert re.search(said, error), error


def test_a_dense_model_in_mla_form_is_refused(tmp_path, capsys):
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    config = LlamaConfig(intermediate_size=48, vocab_size=320, max_position_embeddings=128, **sizes)
    Policy(LlamaForCausalLM(config).eval(), None, small_tokenizer(["two and three"] * 20)).save(tmp_path / "dense")
    convert_checkpoint(str(tmp_path / "dense"), tmp_path / "mla")
    assert main(["serve", str(tmp_path / "mla"), "--backend", "vllm", "--port", "0"])
    assert "(a dense model in MLA form): vLLM does not compute its rotary frequencies" in capsys.readouterr().err

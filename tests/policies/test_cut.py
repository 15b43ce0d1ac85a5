"""A small model of a large one's architecture: its flags and kinds of layers stay, and its windows are short."""

import pytest
from transformers import AutoConfig

from policies.cut import VOCABULARY, WINDOW, cut, cut_layers, cut_model


def test_one_layer_of_each_kind_and_every_list_cut_alike():
    layers = {"layer_types": ["linear", "linear", "full", "linear"], "mlp_layer_types": ["dense"] + 3 * ["sparse"]}
    fields = {"num_hidden_layers": 4, "no_rope_layer_ids": [2], "first_k_dense_replace": 1} | layers
    assert cut_layers(fields) == {
        "num_hidden_layers": 3,
        "layer_types": ["linear", "linear", "full"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "no_rope_layer_ids": [2],
        "first_k_dense_replace": 1,
    }
    assert cut_layers({"num_hidden_layers": 32, "expert_layer_period": 4}) == {"num_hidden_layers": 4}
    assert cut_layers({"n_layer": 32}, 3) == {"n_layer": 3}


def test_flags_and_multipliers_stay_and_the_model_is_small():
    config = AutoConfig.for_model("granite", logits_scaling=3.0, attention_bias=True, eos_token_id=31999)
    small = cut(config)
    assert (small.logits_scaling, small.attention_bias, small.rope_parameters) == (3.0, True, config.rope_parameters)
    assert (small.num_hidden_layers, small.vocab_size, small.eos_token_id) == (2, VOCABULARY, VOCABULARY - 1)
    assert small.num_attention_heads / small.num_key_value_heads == (
        config.num_attention_heads / config.num_key_value_heads
    )
    windows = cut(AutoConfig.for_model("gpt_oss", sliding_window=128))
    assert (windows.sliding_window, windows.layer_types) == (WINDOW, ["sliding_attention", "full_attention"])
    experts = cut(AutoConfig.for_model("deepseek_v3"))
    assert (experts.num_experts_per_tok, experts.n_group, experts.topk_group) == (8, 8, 4)
    assert experts.n_routed_experts % 8 == 0
    assert experts.first_k_dense_replace == 1


def test_what_cannot_be_cut_says_why():
    odd = AutoConfig.for_model("llama", hidden_size=3 * 5002, num_attention_heads=3, num_key_value_heads=1)
    with pytest.raises(
        ValueError, match=r"no small model of type 'llama' can be built: two of its layers have \d+ mill"
    ):
        cut_model(odd)

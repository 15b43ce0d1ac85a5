"""The load check beyond what short rows and low precision tell: on a small model of the same architecture."""

import pytest
import torch
import zoo

from grpo.source import agreement
from grpo.source.agreement import check_agreement
from policies.attention import Packing
from policies.paths import Paths
from rollout.backends.states import RowStates

EXPERTS = {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.fixture(autouse=True)
def cuts(monkeypatch) -> list[str]:
    """The types of which a small model was built; nothing is remembered from other tests."""
    built: list[str] = []
    build = agreement.cut_model

    def counted(config, **options):
        built.append(config.model_type)
        return build(config, **options)

    monkeypatch.setattr(agreement, "_OF_CUT", {})
    monkeypatch.setattr(agreement, "cut_model", counted)
    return built


@pytest.mark.slow
def test_the_paths_of_bfloat16_are_those_of_float32(hf_policy, monkeypatch, cuts):
    """In bfloat16 so much is allowed that a cache which drops the recurrent state could seem right."""

    class Forgetful(RowStates):
        def get_recurrent_state(self, layer_idx, state_idx=0):
            return None

    monkeypatch.setattr("rollout.backends.hf.RowStates", Forgetful)
    policy = hf_policy("falcon_h1", 3, head_dim=8, mamba_n_heads=8, mamba_d_head=8, mamba_d_ssm=64, mamba_d_state=8)
    for parameter in policy.trunk.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    check_agreement(policy)
    check_agreement(policy)
    assert policy.paths == Paths("joined")
    assert cuts == ["falcon_h1"]


def test_a_window_that_short_rows_never_leave_is_tried(hf_policy, monkeypatch, cuts):
    policy = hf_policy("gpt_oss", 3, **EXPERTS)
    assert policy.config.sliding_window == 128
    monkeypatch.setattr(Packing, "within", lambda self, window: self)
    check_agreement(policy)
    assert policy.paths == Paths("own", "alone")


def test_float32_without_windows_builds_nothing(hf_policy, cuts):
    check_agreement(hf_policy("llama"))
    assert cuts == []


@pytest.mark.parametrize(
    ("kind", "config", "paths"), [("gpt_oss", EXPERTS, Paths("apart", "alone")), ("llama", {}, Paths())]
)
def test_where_no_small_model_can_be_built_windows_are_left_to_transformers(
    hf_policy, monkeypatch, kind, config, paths
):
    def fails(config, **options):
        raise ValueError("it is too large")

    monkeypatch.setattr(agreement, "cut_model", fails)
    policy = hf_policy(kind, 3, **config)
    for parameter in policy.trunk.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    check_agreement(policy)
    assert policy.paths == paths


@pytest.mark.parametrize(("tokens", "rows"), [(1, "packed"), (6, "alone")])
def test_in_bfloat16_an_improbable_token_does_not_choose_a_slower_path(hf_policy, monkeypatch, tokens, rows):
    """SmolLM2-135M in bfloat16 gives improbable tokens other log-probabilities by each path, up to 9 apart."""
    policy = hf_policy("llama")
    for parameter in policy.trunk.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    own = torch.full((8,), -24.0)
    by_path = own.clone()
    by_path[:tokens] -= 8

    def by_learner(policy):
        return (by_path if policy.paths.rows == "packed" else own), own

    monkeypatch.setattr(agreement, "fastest_of_cut", lambda policy: Paths())
    monkeypatch.setattr(agreement, "by_learner", by_learner)
    check_agreement(policy)
    assert policy.paths.rows == rows


FULL = {"layer_types": ["full_attention", "full_attention"]}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("qwen3_5_text", FULL),
        ("lfm2", FULL | {"num_hidden_layers": 2}),
        ("got_ocr2", {"use_sliding_window": True, "max_window_layers": 1, "layer_types": None, "sliding_window": 8}),
        ("phimoe", {"sliding_window": 256}),  # as long as the context: it never slides
    ],
)
def test_a_prompt_is_read_once_where_a_layer_only_asks_for_more_of_the_mask(kind, changes):
    policy = zoo.policy(kind, **changes)
    check_agreement(policy)
    assert (policy.paths, policy.paths.slower) == (Paths(), ())
    assert policy.reads_trees


def test_no_slower_path_is_taken_without_its_reason():
    policy = zoo.policy("minimax")
    check_agreement(policy)
    assert policy.paths == Paths("apart", "alone")
    no_cache, no_padding, no_packing = policy.paths.slower
    for reason, path in (
        (no_cache, "our cache"),
        (no_padding, "transformers' cache"),
        (no_packing, "a prompt is read"),
    ):
        assert reason.startswith(f"not {path!r}"[:-1])
        assert "log-probabilities differ from those of its own forward by" in reason
    assert all(reason in policy.paths.with_reasons for reason in policy.paths.slower)
    assert Paths.from_bytes(policy.paths.to_bytes()).slower == policy.paths.slower

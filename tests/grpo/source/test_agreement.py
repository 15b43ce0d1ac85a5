"""The load check beyond what short rows and low precision tell: on a small model of the same architecture."""

import pytest
import torch

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

"""`rollout.quantization` in a run: what is refused before a model is loaded, and three steps of GRPO."""

import json

import pytest

from grpo.config.run import SftConfig, TrainConfig
from grpo.task.check import check_plan
from grpo.train import train
from rewards.config.options import ConfigError, load


def test_bits_that_nobody_has_are_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"rollout\.quantization=fp8 .*'none', 'int8' or 'int4'"):
        load(TrainConfig, None, {"output_dir": str(tmp_path / "run"), "rollout.quantization": "fp8"})


def test_other_commands_models_and_ranks_are_refused(tmp_path, hf_policy, monkeypatch):
    hf_policy("qwen2", 5).save(tmp_path / "qwen2")
    given = {"output_dir": str(tmp_path / "run"), "rollout.quantization": "int8"}
    with pytest.raises(ConfigError, match="rollout.quantization=int8 .command line.: quartet sft does not use it"):
        load(SftConfig, None, given)
    with pytest.raises(ValueError, match="rollout.quantization=int8 with model=.* of type 'qwen2'"):
        check_plan(load(TrainConfig, None, given | {"model": str(tmp_path / "qwen2")}))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="rollout.quantization=int8 with several ranks"):
        check_plan(load(TrainConfig, None, given))


@pytest.mark.slow
def test_a_run_learns_with_a_quantised_sampler(tmp_path, micro_config):
    config = micro_config(tmp_path / "run", **{"rollout.quantization": "int8"})
    train(config)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    mismatch = [row["mismatch/logprob_abs_mean"] for row in rows if "mismatch/logprob_abs_mean" in row]
    assert len(mismatch) == 3
    assert all(1e-6 < value < 0.1 for value in mismatch)  # in float32 it would be 1e-7 without rounding
    assert all(row["sync_check/logprob_abs_mean"] < 1e-5 for row in rows if "sync_check/logprob_abs_mean" in row)
    assert sum("mismatch/weight_mean" in row for row in rows) == 3  # the importance correction is on

"""`lora.base: nf4`: who is refused, and a run that stops and goes on to the same bits."""

import json
import re
from importlib import util
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from small_learner import small_learner

from grpo.cli.commands import summary
from grpo.cli.commands.export import export
from grpo.cli.commands.memory import MemoryOfRun
from grpo.config.run import TrainConfig
from grpo.run.resume import base_checksum
from grpo.run.stop import Stopped
from grpo.source.policy_source import find_policy, load_found
from grpo.task.check import check_plan
from grpo.train import train
from policies import four_bit
from policies.policy import Policy, PolicyError, checksum
from review.readers.run_folder import read_metrics
from rewards.config.options import load

needs_bitsandbytes = pytest.mark.skipif(util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
NF4 = {"lora.rank": 4, "lora.base": "nf4", "sft.steps": 0}


def options(tmp_path, **given):
    return load(TrainConfig, None, {"model": "nowhere", "output_dir": tmp_path / "r", **NF4, **given})


@needs_bitsandbytes
def test_a_device_that_bitsandbytes_cannot_use_is_refused_before_the_model_is_looked_at(tmp_path, monkeypatch):
    def none_here(*_, **__):
        raise NotImplementedError("no kernel")

    monkeypatch.setattr("bitsandbytes.functional.quantize_4bit", none_here)
    with pytest.raises(ValueError, match=r"lora\.base=nf4.*cannot compute on device=cpu here .* use another device"):
        check_plan(options(tmp_path, device="cpu"))


@pytest.fixture(scope="module")
def folder(model):
    return Path(model)


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_stops_goes_on_to_the_same_bits_and_ends_as_an_ordinary_policy(folder, micro_config, tmp_path, dtype):
    def config(name):
        return micro_config(tmp_path / name, model=str(folder), dtype=dtype, steps=2, **NF4)

    whole = train(config("whole"))
    with pytest.raises(Stopped):
        train(config("parts"), stop_after=1)
    checkpoint = tmp_path / "parts/checkpoints/step_000001"
    with safe_open(checkpoint / "policy.safetensors", "pt") as kept:
        trunk = [name for name in kept.keys() if name.startswith("trunk.")]  # noqa: SIM118
    assert trunk
    assert all(".lora_" in name or name.endswith("e_score_correction_bias") for name in trunk)
    of_step_1 = load_found(find_policy(str(checkpoint)), config("parts"))
    with pytest.raises(ValueError, match=r"lora\.base=nf4 with .*a checkpoint of a run.: it needs a saved policy"):
        check_plan(micro_config(tmp_path / "next", model=str(checkpoint), **NF4))
    parts = train(config("parts"), resume="auto")
    ends = [
        checksum(Policy.load(tmp_path / name / "policy", getattr(torch, dtype)).weights())
        for name in ("whole", "parts")
    ]
    assert ends[0] == ends[1] == checksum(whole.policy.weights()) == checksum(parts.policy.weights())
    assert checksum(of_step_1.weights()) != ends[0]
    last = find_policy(str(tmp_path / "whole/checkpoints/step_000002"))
    assert checksum(load_found(last, config("whole")).weights()) == ends[0]
    assert "quant" not in (tmp_path / "whole/policy/config.json").read_text()
    assert "over a base in 4 bits" in export(tmp_path / "parts", tmp_path / "adapter", adapter=True)
    assert "over a base in 4 bits" not in export(tmp_path / "parts", tmp_path / "merged")
    assert checksum(Policy.load(tmp_path / "merged", getattr(torch, dtype)).weights()) == ends[0]
    metrics = read_metrics(tmp_path / "whole")
    farthest = [row["mismatch/logprob_abs_max"] for row in metrics if "mismatch/logprob_abs_max" in row]
    assert farthest
    assert dtype == "bfloat16" or max(farthest) < 1e-4
    events = [json.loads(line) for line in (tmp_path / "whole/events.jsonl").read_text().splitlines()]
    [event] = [event for event in events if event["event"] == "base_in_4_bits"]
    assert (event["in_4_bits"], event["routed_experts"]) == (_in_4_bits(folder), 4 * 3 * 16 * 32)


def _in_4_bits(folder) -> int:
    return sum(weight.numel() for weight in four_bit.chosen(Policy.load(folder).trunk).values())


@needs_bitsandbytes
def test_another_base_is_refused_also_where_its_codes_are_the_same(folder, micro_config, tmp_path):
    """Weights twice as large have the same codes and other scales."""
    other, place = Policy.load(folder), tmp_path / "base"
    with torch.no_grad():
        for weight in four_bit.chosen(other.trunk).values():
            weight.mul_(2)
    other.save(tmp_path / "other")
    policies = [Policy.load(path, in_4_bits=True) for path in (folder, tmp_path / "other", folder)]
    digests = [base_checksum(policy, []) for policy in policies]
    assert digests[0] == digests[2] != digests[1]

    Policy.load(folder).save(place)
    config = micro_config(tmp_path / "r", model=str(place), steps=2, **NF4)
    with pytest.raises(Stopped):
        train(config, stop_after=1)
    other.save(place)
    with pytest.raises(ValueError, match="the base weights are not those that the adapters of step 1 were trained on"):
        train(config, resume="auto")
    with pytest.raises(PolicyError, match="the base weights are not those"):
        load_found(find_policy(str(tmp_path / "r")), config)


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("targets", [None, ["q_proj", "experts", "mtp"]])
def test_the_learner_holds_what_the_dry_run_foretold(folder, tmp_path, dtype, targets):
    config = options(tmp_path, dtype=dtype, **{"lora.targets": targets})
    policy = Policy.load(folder, getattr(torch, dtype), in_4_bits=True)
    policy.add_lora(4, 32.0, targets)
    learner = small_learner(policy, config.learner, config.mtp)
    foretold = MemoryOfRun(policy.config, True, config).learner()
    held = [(weight, weight.quant_state) for weight in policy.parameters() if four_bit.is_held(weight)]
    tensors = [*policy.parameters(), *policy.buffers(), *(part for _, q in held for part in (q.absmax, q.code))]
    assert foretold.weights == sum(tensor.nbytes for tensor in tensors)
    assert foretold.masters == sum(master.nbytes for _, master in learner.masters.pairs)
    own = {tensor.untyped_storage()._cdata for tensor in tensors}
    fresh = [t for t in learner.weights().values() if t.untyped_storage()._cdata not in own]
    assert foretold.publication == sum(tensor.nbytes for tensor in fresh)
    usual = config.model_copy(update={"lora": config.lora.model_copy(update={"base": None})})
    assert MemoryOfRun(policy.config, True, usual).learner().weights > foretold.weights


@needs_bitsandbytes
def test_the_dry_run_says_what_stays_as_it_is(folder, micro_config, tmp_path):
    report = summary.dry_run(micro_config(tmp_path / "r", model=str(folder), **NF4))
    assert re.search(r"^0\.0 M parameters, .* and routed experts \(0\.0 M\)", report.facts["base in 4 bits"])

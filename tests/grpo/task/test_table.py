"""What does not go with what: the table names what exists, and what it refuses is named with the way out."""

import doctest

import pytest

from grpo.cli.config.inference import EvalConfig
from grpo.cli.config.serve import ServeConfig
from grpo.cli.quantize.options import QuantizeConfig
from grpo.config.mtp import MtpConfig
from grpo.config.run import SftConfig, TrainConfig
from grpo.task import table
from grpo.task.check import check_plan
from grpo.task.plan import Plan
from grpo.task.table import FORMS, contradictions
from rewards.config.options import ConfigError, _options, load

SUMS = {"loss.multi_objective_aggregation": "normalize_then_sum"}
VLLM = {"rollout.backend": "vllm", "rollout.draft_tokens": 2}
TEACHER = {"loss.advantage": "distill", "distill.teacher": "nowhere@http://h"}
SEQUENCE = {"loss.loss_type": "reinforce", "loss.importance_sampling_level": "sequence"}
NF4, INT8 = {"lora.base": "nf4"}, {"rollout.quantization": "int8"}


def test_the_table_names_options_and_forms_that_exist_and_every_form():
    commands = TrainConfig, SftConfig, MtpConfig, EvalConfig, ServeConfig, QuantizeConfig
    keys = {option.key for command in commands for option in _options(command.model_construct())}
    written = {name.replace("!", "") for left, row in table.table().items() for name in (left, *row)}
    names = {name.partition("=")[0] for name in written - set(FORMS)}
    assert names - set(FORMS) <= keys
    assert set(FORMS) <= names | written
    assert doctest.testmod(table).failed == 0


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"eval.every": 5}, "eval.limit=0 with eval.every=5: that evaluates nothing"),
        ({"loss.loss_type": "cispo"}, "loss.epsilon_high=null with loss.loss_type=cispo: cispo needs the cap"),
        (SUMS | {"loss.advantage": "rloo"}, "advantage=rloo with .*_then_sum: .* takes the weighted sum; use"),
        ({"loss.advantage": "rloo", "loss.scale_rewards": "none"}, "rloo with loss.scale_rewards=none: .* of its own"),
        ({"loss.advantage": "gae", "loss.scale_rewards": "batch"}, "gae with loss.scale_rewards=batch: that estimator"),
        ({"loss.delta": 1.1}, "delta=1.1 with loss.epsilon=0.2 .*ends at 1.2.: delta bounds the ratio .*; raise delta"),
        ({"loss.delta": 1.25, "loss.epsilon_high": 0.28}, "delta=1.25 with loss.epsilon_high=0.28 .*ends at 1.28"),
        (SEQUENCE, "level=sequence with loss.loss_type=reinforce, which reads no ratio: leave importance_sampling"),
        ({"value.lam": 0.9}, "value.lam=0.9 with loss.advantage=group_relative, which has no value head: .* leave lam"),
        ({"distill.top_k": 4}, "loss.advantage=group_relative with distill.top_k=4: .* leave top_k out"),
        ({"loss.advantage": "distill"}, "distill.teacher=null with loss.advantage=distill: distill needs a teacher"),
        (TEACHER | {"loss.advantage": "rloo"}, "advantage=rloo with distill.teacher=nowhere@.*: distill alone has a"),
        (TEACHER | {"rollout.temperature": 0.7}, "temperature=0.7 with distill.teacher=.*: .* at temperature 1 only"),
        ({"learner.optimizer": "adamw_8bit_stochastic"}, "dtype=float32 with .*_stochastic: only bfloat16"),
        (INT8 | {"rollout.backend": "vllm"}, "rollout.backend=vllm with rollout.quantization=int8: our own"),
        (INT8 | {"rollout.backend": "transformers"}, "with rollout.quantization=int8: our own"),
        (INT8 | {"loss.importance_correction": "none"}, "=none with rollout.quantization=int8: what samples"),
        (VLLM | {"rollout.workers": 2}, "rollout.workers=2 with rollout.backend=vllm.*set workers to 0"),
        (VLLM | {"learner.routing_replay": True}, "replay=true with .*vLLM 0.32 returns .*, which needs Triton"),
        (VLLM | {"rollout.vllm.engine": {"dtype": "half"}}, "with rollout.vllm.engine.dtype=half: quartet sets that"),
        (NF4 | {"learner.workers": 2}, "nf4 with several ranks .* learn in one process, or set lora.base to null"),
        (NF4 | {"learner.parallel.fsdp": 2}, "lora.base=nf4 with several ranks"),
        (NF4 | {"learner.parallel.tensor": 2}, "lora.base=nf4 with several ranks"),
        (NF4 | {"sft.steps": 3}, "sft.steps=3 with lora.base=nf4: .* run quartet sft before"),
        (NF4 | {"model": "tiny"}, "lora.base=nf4 with model='tiny' .a preset.: .* random weights; train it before"),
        (NF4 | {"model": "a.gguf"}, "lora.base=nf4 with model='a.gguf' .*: .* name the model that it was made from"),
    ],
)
def test_what_contradicts_each_other_is_named_with_the_way_out(given, words, tmp_path, monkeypatch):
    """Also where the model is not there, or cannot be read, which is another line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(table, "find_spec", lambda name: True)
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=words):
        check_plan(load(TrainConfig, None, {"output_dir": "r", "model": "nowhere", "data.limit": 8, **given}))


def test_what_is_read_contradicts_nothing():
    """Next to each of the refusals above: the bound at the end of the clip range, a ratio that the KL reads."""
    read = (
        {"loss.delta": 1.2},
        {"loss.delta": 1.3, "loss.epsilon_high": 0.28},
        SEQUENCE | {"loss.beta": 0.1},
        {"loss.scale_rewards": "none"},
        {"loss.advantage": "gae", "value.lam": 0.9},
    )
    for given in read:
        assert list(contradictions(Plan(load(TrainConfig, None, {"output_dir": "r", **given})))) == []
    assert list(contradictions(Plan(load(SftConfig, None, {"output_dir": "r"})))) == []


def test_missing_packages_are_named_with_their_extra_and_ranks_that_others_have_started_are_several(monkeypatch):
    monkeypatch.setattr(table, "find_spec", lambda name: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    given = NF4 | {"output_dir": "r", "learner.optimizer": "adamw_8bit", "agent": "a.py:b"}
    lines = "\n".join(contradictions(Plan(load(TrainConfig, None, given))))
    assert "lora.base=nf4 with several ranks" in lines
    assert "nf4 needs bitsandbytes: pip install 'quartet-rl[low-memory]', or set lora.base to null" in lines
    assert "adamw_8bit needs torchao: pip install 'quartet-rl[low-memory]', or use adamw" in lines
    assert "agent=a.py:b needs starlette and uvicorn: pip install 'quartet-rl[serve]', or leave the agent out" in lines


@pytest.mark.parametrize(
    ("kind", "given", "words"),
    [
        ("cuda", INT8, "quantization=int8 with device=cuda: the products .* are kernels of a CPU.* drop it"),
        ("xpu", INT8 | {"device": "xpu"}, "rollout.quantization=int8 with device=xpu: the products"),
        ("cuda", {"dtype": "bfloat16"}, "bfloat16 with device=cuda: .* torch would emulate it.* set dtype to"),
        ("mps", {"learner.workers": 2}, "several ranks .* with device=mps: .* learn in one process, or set device"),
        ("cuda", {"device": "mps"}, "device=mps: there is no such device here; use cpu, cuda, cuda:0, or auto"),
    ],
)
def test_what_a_device_cannot_do_is_named_with_the_way_out(kind, given, words, accelerator):
    """A CPU may do what an accelerator may not."""
    accelerator(kind, is_bf16_supported=lambda emulated: emulated)
    with pytest.raises(ValueError, match=words):
        check_plan(load(TrainConfig, None, {"output_dir": "r", "data.limit": 8, **given}))
    config = load(TrainConfig, None, {"output_dir": "r", **INT8, "dtype": "bfloat16", "device": "cpu"})
    assert not any("device" in line for line in contradictions(Plan(config)))


def test_all_contradictions_are_found_at_once():
    given = {"eval.every": 2, "rollout.staleness": 1, "checkpoint.keep_best": True, "rollout.max_resamples": 1}
    with pytest.raises(ConfigError) as error:
        load(MtpConfig, None, {"output_dir": "r", **given})
    assert sorted(line.partition("=")[0] for line in error.value.problems) == sorted(given)
    assert all(line.endswith("quartet mtp does not use it; leave it out") for line in error.value.problems)
    both = {"eval.every": 2, "loss.loss_type": "cispo"}
    assert len(list(contradictions(Plan(load(TrainConfig, None, {"output_dir": "r", **both}))))) == 2
    assert list(contradictions(Plan(load(TrainConfig, None, {"output_dir": "r"})))) == []

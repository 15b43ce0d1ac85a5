"""Full memory, in every phase of a run: one message that names the phase and the option to lower."""

import errno
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

import rollout.decoding.engine
from grpo.cli.config.inference import EvalConfig, SampleConfig
from grpo.cli.parse import main
from grpo.config.learner import LearnerOptions
from grpo.config.run import TrainConfig
from grpo.learner.likelihood import Likelihood
from grpo.run.memory_errors import NAMES, WAYS, OutOfMemory, is_full, phase
from policies.policy import Policy
from rewards.config.options import load
from rollout.workers.local_pool import LocalPool

CUDA = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.06 GiB is "
    "free. Including non-PyTorch memory, this process has 78.05 GiB memory in use. If reserved but unallocated memory "
    "is large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
)
PLACES = {
    "loading": (Policy, "to", "set dtype: bfloat16"),
    "evaluating": (LocalPool, "sample", "lower rollout.max_completion_tokens=6"),
    "sampling": (LocalPool, "sample", "lower rollout.prompts_per_shard=2, lower rollout.max_completion_to"),
    "learning": (Likelihood, "forward", "lower learner.tokens_per_micro_batch=8192, set learner.gradient_check"),
    "publishing": (rollout.decoding.engine.Engine, "sync_weights", "set rollout.workers: 1"),
    "stepping": (torch.optim.AdamW, "step", "start more processes, which share the weights (learner.parallel.fsdp)"),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_run_says_in_one_message_what_was_going_on_and_what_to_lower(name, run_words, tmp_path, monkeypatch, capsys):
    sample, forward = rollout.decoding.engine.Engine.sample, Likelihood.forward

    def full(*given, **named):
        if name == "learning" and not torch.is_grad_enabled():  # the canaries of a publication
            return forward(*given, **named)
        if PLACES[name][1] == "sample" and given[1][0].prompt_id.startswith("canary/"):  # they are few and short
            return sample(*given, **named)
        raise torch.OutOfMemoryError(CUDA)

    place, method, way_out = PLACES[name]
    monkeypatch.setattr(place, method, full)
    given = {"prompts_per_step": 2, "rollout.group_size": 2, "rollout.prompts_per_shard": 2, "rollout.draft_tokens": 0}
    given |= {"eval.limit": 2 if name == "evaluating" else 0}
    words = run_words(tmp_path / "run", **given)
    assert main(words[2:]) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    [line] = [line for line in said.splitlines() if line.startswith("quartet: ")]
    assert line.startswith(f"quartet: out of memory while {NAMES[name]}: ")
    assert way_out in line
    assert line.endswith("GPU 0 has a total capacity of 79.11 GiB of which 1.06 GiB is free")


def test_learning_says_which_of_its_options_can_still_be_lowered():
    def said(**options) -> str:
        with (
            pytest.raises(OutOfMemory) as caught,
            phase("learning", SimpleNamespace(learner=LearnerOptions(**options))),
        ):
            raise torch.OutOfMemoryError(CUDA)
        return str(caught.value)

    assert "lower learner.tokens_per_micro_batch=8192, set learner.gradient_checkpointing: true, or start" in said()
    assert "gradient_checkpointing" not in said(gradient_checkpointing=True)
    assert "tokens_per_micro_batch" not in said(tokens_per_micro_batch=1)


def test_a_phase_of_which_nothing_can_be_lowered_asks_for_another_device():
    said = "while sampling: use a device with more memory. CUDA"
    with pytest.raises(OutOfMemory, match=said), phase("sampling", SimpleNamespace()):
        raise torch.OutOfMemoryError(CUDA)
    said, config = "backward pass: .* can't allocate memory: you tried", SimpleNamespace(learner=LearnerOptions())
    with pytest.raises(OutOfMemory, match=said), phase("learning", config):  # of the host
        torch.empty(10**15)


def test_every_option_that_a_phase_names_is_there(tmp_path):
    configs = [load(TrainConfig, None, {"output_dir": tmp_path}), EvalConfig(), SampleConfig()]

    def has(config: object, key: str) -> bool:
        for part in key.split("."):
            if not hasattr(config, part):
                return False
            config = getattr(config, part)
        return True

    keys = {way.key for ways in WAYS.values() for way in ways} - {"mtp.tokens_per_update"}  # of MtpConfig
    assert [key for key in sorted(keys) if not any(has(config, key) for config in configs)] == []


def test_what_full_memory_is():
    for full in (
        torch.OutOfMemoryError(CUDA),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ):
        assert is_full(full), full
    for other in (
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ValueError("out of memory"),
    ):
        assert not is_full(other), other


def test_other_errors_pass_and_the_innermost_phase_is_named():
    with pytest.raises(ZeroDivisionError), phase("learning", SimpleNamespace()):
        1 / 0  # noqa: B018
    nothing = SimpleNamespace()
    with pytest.raises(OutOfMemory, match="the optimizer step"), phase("learning", nothing), phase("stepping", nothing):
        raise torch.OutOfMemoryError(CUDA)


def test_what_the_failed_computation_has_held_is_freed():
    """The exception outlives it: while it is handled, a checkpoint is written."""
    held = []

    def compute() -> None:
        activations = torch.zeros(3)
        held.append(weakref.ref(activations))
        raise torch.OutOfMemoryError(CUDA)

    try:
        with phase("learning", SimpleNamespace()):
            compute()
    except OutOfMemory:
        gc.collect()
        assert held[0]() is None
    else:
        pytest.fail("nothing was raised")

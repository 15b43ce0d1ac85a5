"""Run by test_sharded_checkpoint.py in N gloo processes that share a learner: main(FOLDER, ACTION), RANK and WORLD_SIZE
being set.

    save    step 1 and the policy are saved, and FOLDER/whole.safetensors holds the tensors; then a rank cannot write
            step 2, and a file of step 3 is damaged
    load    the learner goes on from step 1; its tensors are compared with those of FOLDER/whole.safetensors
"""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import MICRO
from many_ranks import learner_of
from recorded import groups_of
from safetensors.torch import load_file, save_file

import policies.sharding
from grpo.config.learner import ParallelOptions
from grpo.learner.parallel import join
from grpo.run import checkpoint
from grpo.run.checkpoint import CheckpointError
from policies.presets import PRESETS, build
from policies.sharding import whole

TWO = "policy-00002-of-00002.safetensors"


def wait() -> None:
    if dist.is_initialized():
        dist.barrier()


def flat(tensors: dict) -> dict[str, torch.Tensor]:
    """Every tensor whole."""
    return {
        f"{part} {name}": whole(tensor.detach()).clone()
        for part, mapping in tensors.items()
        for name, tensor in mapping.items()
    }


@contextmanager
def small_files(here: bool) -> Iterator[None]:
    """No file may pass 5,000 bytes: what this process writes fails as on a full disk."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    if here:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)


def refused(act, *arguments, **named) -> dict:
    try:
        act(*arguments, **named)
        return {"said": "", "everywhere": False}
    except CheckpointError as error:
        return {"said": str(error), "everywhere": error.everywhere}


def save(learner, ranks, folder: Path) -> dict:
    learner.step(learner.prepare(*groups_of(5, 1, learner.policy.config.n_routed_experts)), 1)
    tensors, state = learner.state()
    root, found = folder / "checkpoints", {}
    (root / ".step_000009.partial").mkdir(parents=True, exist_ok=True)
    wait()
    checkpoint.save(root, 1, tensors, {"learner": state})
    if ranks.size > 1:
        policies.sharding.AT_ONCE = 40_000
    learner.policy.save(folder / "policy")
    kept = flat(tensors)
    if ranks.first:
        save_file(kept, folder / "whole.safetensors")
    for victim in range(ranks.size) if ranks.size > 1 else ():
        with small_files(ranks.rank == victim):
            found[f"rank {victim}"] = refused(checkpoint.save, root, 2, tensors, {"learner": state})
        wait()
        found[f"rank {victim}"]["left"] = sorted(os.listdir(root))
        wait()
    if ranks.size > 1:
        third = checkpoint.save(root, 3, tensors, {"learner": state})
        found["written"] = sorted(os.listdir(third))
        wait()
        if ranks.first:
            content = bytearray((third / TWO).read_bytes())
            content[-1] ^= 1
            (third / TWO).write_bytes(content)
        wait()
        found["damaged"] = refused(checkpoint.load, third, together=True)
    return found


def load(learner, folder: Path) -> dict:
    stored = checkpoint.load(folder / "checkpoints/step_000001", together=True)
    learner.load_state(stored.tensors, stored.state["learner"])
    expected, own = load_file(folder / "whole.safetensors"), flat(learner.state()[0])
    assert own.keys() == expected.keys()
    return {"compared": len(own), "other": [name for name, tensor in own.items() if not tensor.equal(expected[name])]}


def main(folder: Path, action: str) -> dict:
    torch.set_num_threads(1)
    PRESETS["micro"] = MICRO
    ranks = join(True, ParallelOptions())
    if ranks.first and action == "save":
        build("micro", ["two plus three is five\n"] * 5, 0).save(folder / "model")
    wait()
    learner = learner_of(folder / "model", {"loss": {"advantage": "gae"}}, ranks)
    found = save(learner, ranks, folder) if action == "save" else load(learner, folder)
    if dist.is_initialized():
        dist.destroy_process_group()  # else its threads may abort the end of the process
    return found

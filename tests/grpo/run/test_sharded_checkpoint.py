"""Checkpoints that several ranks write together: each a share of the bytes, and all of them or none."""

import functools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import saving_ranks
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from start_ranks import results_of_ranks

from grpo.run import checkpoint
from policies.policy import Policy
from policies.tensor_files import owners

SLOW = pytest.mark.slow


def _ranks(folder: Path, action: str, size: int) -> list[dict]:
    """What each rank has found."""
    return results_of_ranks(saving_ranks.main, folder, action, size=size)


@pytest.fixture(scope="module")
def saved(micro_preset, tmp_path_factory) -> Callable[[int], tuple[Path, list[dict]]]:
    """A folder that so many ranks have saved into, and what they have found."""

    @functools.cache
    def save(size: int) -> tuple[Path, list[dict]]:
        folder = tmp_path_factory.mktemp(f"of{size}")
        return folder, _ranks(folder, "save", size) if size > 1 else [saving_ranks.main(folder, "save")]

    return save


@pytest.mark.long
def test_every_rank_writes_its_share_in_files_of_whole_tensors(saved):
    folder, _ = saved(2)
    path = folder / "checkpoints/step_000001"
    files = sorted(file.name for file in path.glob("*.safetensors"))
    parts = ("optimizer", "policy", "value")
    assert files == [f"{part}-0000{i}-of-00002.safetensors" for part in parts for i in (1, 2)]
    found: list[dict[str, torch.Tensor]] = [{}, {}]
    for name in files:
        part, number = name.split("-")[:2]
        found[int(number) - 1] |= {f"{part} {key}": tensor for key, tensor in load_file(path / name).items()}
    sizes = [sum(tensor.nbytes for tensor in part.values()) for part in found]
    assert max(sizes) < 1.05 * sum(sizes) / 2
    expected = load_file(folder / "whole.safetensors")
    assert not found[0].keys() & found[1].keys()
    together = found[0] | found[1]
    assert together.keys() == expected.keys()
    assert all(together[name].equal(tensor) for name, tensor in expected.items())
    listed = json.loads((path / "manifest.json").read_text())["files"]
    assert sorted(listed) == [*files[:4], "state.json", *files[4:]]


def test_one_process_writes_one_file_for_each_mapping(saved):
    folder, _ = saved(1)
    files = sorted(file.name for file in (folder / "checkpoints/step_000001").iterdir())
    assert files == ["manifest.json", "optimizer.safetensors", "policy.safetensors", "state.json", "value.safetensors"]


@pytest.mark.long
@pytest.mark.parametrize(
    ("before", "after"), [(2, 1), (2, 2), pytest.param(1, 2, marks=SLOW), pytest.param(2, 4, marks=SLOW)]
)
def test_a_checkpoint_fits_any_number_of_ranks(saved, before, after):
    folder, _ = saved(before)
    for found in _ranks(folder, "load", after):
        assert found["compared"] > 100
        assert found["other"] == []


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.long)])
def test_a_rank_that_cannot_write_ends_every_rank_with_the_same_words(saved, victim):
    _, shown = saved(2)
    found = [rank[f"rank {victim}"] for rank in shown]
    file = rf"\S+/checkpoints/\.step_000002\.partial/\w+-0000{victim + 1}-of-00002\.safetensors"
    said = rf"cannot write checkpoint \S+/step_000002: rank {victim} of 2: .*File too large: '{file}'; "
    said += r"needs \d+ bytes, \d+ are free: make room, .* then resume; earlier ones are intact"
    for rank in found:
        assert re.fullmatch(said, rank["said"]), rank["said"]
        assert rank["everywhere"]
        assert rank["left"] == ["step_000001"], "nor is a leftover of an earlier save there"
    assert found[0]["said"] == found[1]["said"]


@pytest.mark.slow
def test_a_damaged_file_is_named_on_every_rank(saved):
    _, shown = saved(2)
    said = r"step_000003 is damaged: policy-00002-of-00002.safetensors is .*resume from \S+step_000001"
    for rank in shown:
        assert re.search(said, rank["damaged"]["said"])
        assert rank["damaged"]["everywhere"]


def test_a_file_that_is_missing_is_named(saved, tmp_path):
    """Here by a process that reads alone."""
    folder, _ = saved(2)
    shutil.copytree(folder / "checkpoints/step_000001", tmp_path / "step_000001")
    (tmp_path / "step_000001/value-00001-of-00002.safetensors").unlink()
    with pytest.raises(checkpoint.CheckpointError, match=r"value-00001-of-00002.safetensors is missing"):
        checkpoint.load(tmp_path / "step_000001")


def test_only_the_mappings_that_are_asked_for_are_opened(saved):
    folder, _ = saved(2)
    found = checkpoint.load(folder / "checkpoints/step_000001", only=["policy", "draft"]).tensors
    assert found.keys() == {"policy"}
    with safe_open(folder / "whole.safetensors", "pt") as expected:
        assert len(found["policy"]) == sum(name.startswith("policy ") for name in expected.keys())  # noqa: SIM118
    assert "absent" not in found["policy"]


def test_a_sharded_policy_is_written_some_layers_at_a_time_as_transformers_names_them(saved):
    """What rank 0 has gathered is written before it gathers more."""
    folder, _ = saved(2)
    files = sorted(path.name for path in (folder / "policy").glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) > 2
    stored = {name: (file, tensor) for file in files for name, tensor in load_file(folder / "policy" / file).items()}
    index = json.loads((folder / "policy/model.safetensors.index.json").read_text())["weight_map"]
    assert index == {name: file for name, (file, _) in stored.items()}
    alone = load_file(saved(1)[0] / "policy/model.safetensors")
    assert {name: tensor.shape for name, (_, tensor) in stored.items()} == {n: t.shape for n, t in alone.items()}
    policy, expected = Policy.load(folder / "policy"), load_file(folder / "whole.safetensors")
    for name, parameter in policy.named_parameters():
        assert parameter.equal(expected[f"policy {name}"]), name


def test_the_bytes_of_many_ranks_are_balanced():
    """The largest tensors of a policy are far from equal, and three copies of each are saved."""
    sizes = [900, *[100, 60, 60, 1, 1] * 30]
    tensors = {part: {str(i): torch.empty(n, device="meta") for i, n in enumerate(sizes)} for part in "abc"}
    owner = owners(tensors, 8)
    loads = [sum(sizes[int(name)] for (_, name), rank in owner.items() if rank == r) for r in range(8)]
    assert sum(loads) == 3 * sum(sizes)
    assert max(loads) < 1.02 * sum(loads) / 8
    assert owners({"a": {}}, 8) == {}

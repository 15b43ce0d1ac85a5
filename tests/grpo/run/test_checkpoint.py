import errno
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from killing import kills_itself

from grpo.run import checkpoint
from grpo.run.checkpoint import CheckpointError
from policies import tensor_files
from policies.policy import PolicyError


def _tensors(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"policy": {"weight": torch.full((3, 4), value)}, "optimizer": {"step": torch.tensor(value)}}


def _save(root: Path, step: int, value: float, **options) -> Path:
    return checkpoint.save(root, step, _tensors(value), {"value": value}, **options)


def _value(path: Path | None) -> float:
    """The value that a checkpoint holds, after checking that all of its parts agree."""
    assert path is not None
    found = checkpoint.load(path)
    assert found.tensors["policy"]["weight"].tolist() == [[found.state["value"]] * 4] * 3
    assert found.tensors["optimizer"]["step"].item() == found.state["value"]
    return found.state["value"]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8)


def test_a_checkpoints_files_have_the_mode_that_the_umask_gives(tmp_path):
    before = os.umask(0o027)
    try:
        path = _save(tmp_path, 1, 0.5)
    finally:
        os.umask(before)
    assert {file.name: oct(file.stat().st_mode & 0o777) for file in path.iterdir()} == dict.fromkeys(
        ["policy.safetensors", "optimizer.safetensors", "state.json", "manifest.json"], "0o640"
    )


@pytest.mark.parametrize("step", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_contract_9_a_killed_save_leaves_the_previous_checkpoint(tmp_path, step):
    """Or, of a save over the only checkpoint (step 1), one of the two."""
    outcomes = []
    for call in range(1, 100):
        root = tmp_path / str(call)
        _save(root, 1, 1.0)
        killed = kills_itself(lambda root=root: _save(root, step, 2.0, keep=1), call)
        newest = checkpoint.find(root, "auto")
        outcomes.append(_value(newest))
        assert newest.name == f"step_{min(step, int(outcomes[-1])):06d}"
        for visible in root.glob("step_*"):
            _value(visible)
        _save(root, step, 3.0)
        assert _value(checkpoint.find(root, "auto")) == 3.0
        assert not list(root.glob(".step_*")), "the next save cleans up"
        if not killed:
            break
    assert not killed
    assert outcomes == sorted(outcomes)
    assert outcomes.count(1.0) > 8, "the save was killed at many moments"
    assert outcomes.count(2.0) > (3 if step == 2 else 0), "and also while the older checkpoint was being removed"


def test_contract_9_every_file_and_both_folders_reach_the_disk_in_order(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor):
        fsync(descriptor)
        order.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda old, new: (replace(old, new), order.append(f"renamed {old.name}")))
    path = _save(tmp_path, 1, 1.0)
    renamed = order.index("renamed .step_000001.partial")
    before, after = order[:renamed], order[renamed + 1 :]
    files = {f".{name}.partial" if name.endswith(".json") else name for name in os.listdir(path)}
    assert files < set(before)
    assert before[-1] == ".step_000001.partial"
    assert after == [tmp_path.name]


def test_contract_9_random_states_and_bits_come_back(tmp_path):
    generator = torch.Generator().manual_seed(3)
    python = random.Random(3)
    version, words, gauss = python.getstate()
    tied = torch.randn(4, 4, generator=generator)
    tensors = {
        "policy": {
            "embed": tied,
            "head": tied,  # tied
            "view": tied[1:3, ::2],  # shares memory, strided
            "half": torch.tensor([float("nan"), -0.0, 1e-40]).bfloat16(),
            "count": torch.arange(3),
            "empty": torch.zeros(0, 5),
            "scalar": torch.tensor(0.1, dtype=torch.float64, requires_grad=True),
        },
        "rng": {"torch": generator.get_state()},
        "nothing": {},
    }
    state = {"python": [version, list(words), gauss], "tenth": 0.1, "name": "Zoë\ud800", "none": None, "yes": True}
    loaded = checkpoint.load(checkpoint.save(tmp_path, 7, tensors, state))
    assert (loaded.step, loaded.state) == (7, state)
    assert loaded.tensors.keys() == tensors.keys()
    for name, mapping in tensors.items():
        assert loaded.tensors[name].keys() == mapping.keys()
        for key, tensor in mapping.items():
            copy = loaded.tensors[name][key]
            assert (copy.dtype, copy.shape) == (tensor.dtype, tensor.shape)
            assert _bits(copy).equal(_bits(tensor))
    restored = random.Random()
    version, words, gauss = loaded.state["python"]
    restored.setstate((version, tuple(words), gauss))
    assert restored.random() == python.random()
    again = torch.Generator()
    again.set_state(loaded.tensors["rng"]["torch"])
    assert torch.rand(3, generator=again).equal(torch.rand(3, generator=generator))


def test_a_damaged_file_is_named_with_the_checkpoint_to_resume_from(tmp_path):
    _save(tmp_path, 9, 9.0)
    _save(tmp_path, 10, 10.0)
    (tmp_path / "step_000010" / "state.json").write_text("{}")  # so that step 9 is the one before that is intact
    for name in ("policy.safetensors", "optimizer.safetensors", "state.json"):
        for damage in ("flip", "cut", "delete"):
            path = _save(tmp_path, 11, 11.0)
            content = bytearray((path / name).read_bytes())
            (path / name).unlink()
            if damage == "flip":
                (path / name).write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
            if damage == "cut":
                (path / name).write_bytes(content[:-3])
            assert checkpoint.find(tmp_path, "auto") == path, "a damaged checkpoint is not skipped in silence"
            with pytest.raises(CheckpointError, match=rf"step_000011 is damaged: {name}.*resume from .*step_000009"):
                checkpoint.load(path)


def test_any_flipped_byte_of_the_manifest_is_seen(tmp_path):
    path = _save(tmp_path, 1, 1.0)
    intact = (path / "manifest.json").read_bytes()
    for index in range(len(intact)):
        (path / "manifest.json").write_bytes(intact[:index] + bytes([intact[index] ^ 1]) + intact[index + 1 :])
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            checkpoint.load(path)


def test_damage_with_nothing_before_it_says_so(tmp_path):
    path = _save(tmp_path, 1, 1.0)
    (path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"manifest.json .*none before it is intact: start a new run"):
        checkpoint.load(path)


@pytest.mark.parametrize(("owner", "function"), [(os, "fsync"), (tensor_files, "save_file"), (os, "replace")])
def test_a_full_disk_names_path_bytes_and_way_out(tmp_path, monkeypatch, owner, function):
    _save(tmp_path, 1, 1.0)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(owner, function, full)
        with pytest.raises(CheckpointError, match=r"step_000002: .*needs \d+ bytes, \d+ are free: make room"):
            _save(tmp_path, 2, 2.0, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]
    assert _value(tmp_path / "step_000001") == 1.0


def test_a_failed_replacement_puts_the_former_checkpoint_back(tmp_path, monkeypatch):
    _save(tmp_path, 1, 1.0)
    real = os.replace

    def only_away(source, target):
        if str(source).endswith(".partial"):
            raise OSError(errno.EIO, "Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "replace", only_away)
    with pytest.raises(CheckpointError, match="Input/output error"):
        _save(tmp_path, 1, 2.0)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]
    assert _value(tmp_path / "step_000001") == 1.0


def test_state_that_json_would_change_is_refused_by_key(tmp_path):
    for value in ((1, 2), float("nan"), torch.zeros(2), [0, {"c": b"x"}], {3: "x"}, Path("x")):
        key = r"state.a.b\[1\].c" if isinstance(value, list) else "state.a.b"
        with pytest.raises(CheckpointError, match=f"^{key} is .*JSON takes only"):
            checkpoint.save(tmp_path, 1, {}, {"a": {"b": value}})
    assert not list(tmp_path.iterdir())


def test_keep_protect_and_later_steps(tmp_path):
    for step in (1, 2, 3, 4):
        _save(tmp_path, step, float(step), keep=2, protect=[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000001", "step_000003", "step_000004"]
    _save(tmp_path, 2, 2.0, keep=1)  # resumed before 3: what came later stays until it is discarded
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000002", "step_000003", "step_000004"]
    assert [path.name for path in checkpoint.discard_after(tmp_path, 2)] == ["step_000003", "step_000004"]
    assert [path.name for path in tmp_path.iterdir()] == ["step_000002"]
    with pytest.raises(CheckpointError, match="keep=0"):
        _save(tmp_path, 5, 5.0, keep=0)


def test_find(tmp_path):
    root = tmp_path / "checkpoints"
    assert checkpoint.find(root, "auto") is None
    _save(root, 999_999, 1.0)
    newest = _save(root, 1_000_000, 2.0)
    (root / ".step_1000001.partial").mkdir()
    (root / "step_notes").mkdir()
    assert checkpoint.find(root, "auto") == newest
    assert checkpoint.find(root, str(root / "step_999999")) == root / "step_999999"
    with pytest.raises(CheckpointError, match=r"step_000005 is no checkpoint.*use auto, or one of: .*step_999999"):
        checkpoint.find(root, str(root / "step_000005"))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 600 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_policy_that_a_full_disk_refuses_leaves_the_former_one(small_disk, micro_policy):
    micro_policy(0).save(small_disk / "policy")
    former = {path.name: path.read_bytes() for path in (small_disk / "policy").iterdir()}
    (small_disk / "other").write_bytes(bytes(shutil.disk_usage(small_disk).free - 20_000))
    with pytest.raises(PolicyError, match=r"cannot write the policy to .*disk/policy: .*needs \d+ bytes: make room"):
        micro_policy(1).save(small_disk / "policy")
    assert sorted(path.name for path in small_disk.iterdir()) == ["other", "policy"]
    assert {path.name: path.read_bytes() for path in (small_disk / "policy").iterdir()} == former

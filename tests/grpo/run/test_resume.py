"""Contract 9: a stopped run resumes to the same bits. N steps = k steps + stop + resume."""

import errno
import functools
import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import ray
import torch
from safetensors.torch import load_file, save_file

from grpo.config.run import SftConfig
from grpo.learner.learner import Learner
from grpo.learner.update import NonFiniteStep, Update
from grpo.run import checkpoint, log, resume
from grpo.run.log import RunLog
from grpo.run.resume import base_changed, refuse_changed_config
from grpo.run.stop import Stopped
from grpo.sft import sft
from grpo.source.policy_source import find_policy, load_found
from grpo.steps.loop import Run
from grpo.train import train
from policies import tensor_files
from policies.files.checksums import CHECKSUMS, write_checksums
from policies.policy import Policy, PolicyError
from review.readers.run_folder import best_step, read_metrics
from rewards.config import names
from rewards.config.options import dump_yaml, load
from rewards.records import read_rollouts
from rollout.workers.cluster import start_ray

STEPS = 5
CURRICULUM = {"curriculum.steps": 4, "curriculum.shortest_share": 0.5}
KINDS = {
    # 5 steps of 4 prompts over 10 examples: epochs end inside steps 3 and 5; over 12, exactly behind step 3.
    "full": {"data.limit": 10},
    "full, epochs end between steps": {"data.limit": 12},
    "lora": {"data.limit": 10, "lora.rank": 4, "loss.beta": 0.05},
    "full, with a reference": {"data.limit": 10, "loss.beta": 0.05},
    "balanced": {"balance.bias_rate": 0.01, "balance.entropy_weight": 0.1, "balance.sequence_weight": 0.1},
    "cosine": {"data.limit": 10, "learner.schedule": "cosine", "learner.warmup_steps": 2},
    "curriculum": {"data.limit": 14, **CURRICULUM},
    "short first, dynamic sampling": {
        "data.limit": 14,
        "curriculum.steps": 4,
        "curriculum.shortest_share": 0.3,
        "rollout.max_resamples": 2,
    },
    "dynamic sampling, epochs end inside refills": {"data.limit": 10, "rollout.max_resamples": 2},
    "lora, curriculum, dynamic sampling": {"data.limit": 14, "lora.rank": 4, **CURRICULUM, "rollout.max_resamples": 2},
}


def _config(micro_config, folder: Path, kind: str, **given):
    options = {"steps": STEPS, "learner.weight_decay": 0.01, "sft.steps": 1} | KINDS[kind]
    options["rollout.max_completion_tokens"] = 6
    if "dynamic" in kind:
        options["rewards"] = [{"function": f"{folder.parent / 'coarse.py'}:coarse"}]
        (folder.parent / "coarse.py").write_text(COARSE)
    return micro_config(folder, **options | given)


VARIANTS = {  # of others, which `make test-slow` runs
    *("full, epochs end between steps", "full, with a reference", "cosine", "short first, dynamic sampling"),
    *("lora", "curriculum", "balanced", "dynamic sampling, epochs end inside refills"),
}
COARSE = """
def coarse(completions, **_):
    return [float(completion.count("e") > 0) for completion in completions]
"""


def _tensors(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Parameters, reference and optimizer state of a checkpoint, by file and name."""
    saved = checkpoint.load(folder / f"checkpoints/step_{step:06d}")
    return {f"{file}/{name}": t for file, mapping in saved.tensors.items() for name, t in mapping.items()}


def _assert_same_checkpoint(a: Path, b: Path, step: int) -> None:
    first, second = _tensors(a, step), _tensors(b, step)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    states = [json.loads((folder / f"checkpoints/step_{step:06d}/state.json").read_text()) for folder in (a, b)]
    assert states[0] == states[1]


def _untimed(folder: Path) -> list[dict]:
    return [
        {k: v for k, v in line.items() if not k.startswith(("time/", "speed/", "memory/", "run/"))}
        for line in read_metrics(folder)
    ]


@pytest.fixture(scope="module")
def whole(micro_config, tmp_path_factory):
    """`whole(kind)`: the folder of an uninterrupted run of that kind, made once."""

    @functools.cache
    def folder_of(kind: str) -> Path:
        folder = tmp_path_factory.mktemp("whole") / "run"
        train(_config(micro_config, folder, kind), resume="auto")  # which has nothing to go on with
        return folder

    return folder_of


def _stop_after(micro_config, folder: Path, kind: str, k: int) -> None:
    with pytest.raises(Stopped, match=f'stopped after step {k}; go on with resume="auto"'):
        train(_config(micro_config, folder, kind), stop_after=k)
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())][-1] == f"step_{k:06d}"
    assert not (folder / "policy").exists()


@pytest.mark.parametrize(
    ("kind", "k"),
    [
        pytest.param(
            kind, k, marks=[pytest.mark.long] * (k == 3 or kind in VARIANTS) + [pytest.mark.slow] * (kind != "full")
        )
        for k in (2, 3)
        for kind in KINDS
    ],
)
def test_contract_9_a_stopped_run_resumes_to_the_same_bits(micro_config, whole, tmp_path, kind, k):
    reference, folder = whole(kind), tmp_path / "run"
    _stop_after(micro_config, folder, kind, k)
    train(_config(micro_config, folder, kind), resume="auto")
    # The next rollouts: tokens, log-probabilities, rewards and advantages of every later step.
    for step in range(1, STEPS + 1):
        assert read_rollouts(folder, step) == read_rollouts(reference, step)
        _assert_same_checkpoint(folder, reference, step)
    assert _untimed(folder) == _untimed(reference)
    # The parameters did move, also after the resume, and so did the head and its moments.
    before, after = _tensors(folder, k), _tensors(folder, STEPS)
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert any(name.startswith("policy/trunk.") for name in moved)
    assert any(name.startswith("policy/mtp.") for name in moved)
    assert any(name.startswith("optimizer/") and name.endswith("exp_avg_sq") for name in moved)
    assert not any(name.startswith("reference/") for name in moved)
    assert ("lora" in kind) == any(".lora_" in name for name in after)
    assert ("reference" in kind) == any(name.startswith("reference/") for name in after)
    if "dynamic" in kind:
        assert sum(line["group/resampled"] for line in read_metrics(folder)) > 0
    if "curriculum" in kind:
        assert read_metrics(folder)[-1]["curriculum/seen"] > 0.2


@pytest.mark.slow
def test_contract_9_several_stops_are_as_good_as_one(micro_config, whole, tmp_path):
    """And the newest checkpoints are kept."""
    folder, given = tmp_path / "run", {"checkpoint.keep": 2}
    for k in (1, 2, 4):
        with pytest.raises(Stopped):
            train(_config(micro_config, folder, "full", **given), resume="auto", stop_after=k)
    train(_config(micro_config, folder, "full", **given), resume="auto")
    _assert_same_checkpoint(folder, whole("full"), STEPS)
    assert list(checkpoint.saved(folder / "checkpoints")) == [4, 5]


@pytest.fixture(scope="module")
def cluster():
    start_ray(2)
    yield
    ray.shutdown()


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("kind", [pytest.param("full", marks=pytest.mark.long), "lora, curriculum, dynamic sampling"])
def test_contract_9_with_two_ray_workers(micro_config, whole, tmp_path, kind):
    folder, given = tmp_path / "run", {"rollout.workers": 2}
    with pytest.raises(Stopped):
        train(_config(micro_config, folder, kind, **given), stop_after=2)
    train(_config(micro_config, folder, kind, **given), resume="auto")
    reference = whole(kind)
    for step in range(1, STEPS + 1):
        assert read_rollouts(folder, step) == read_rollouts(reference, step)
    _assert_same_checkpoint(folder, reference, STEPS)


@pytest.mark.slow
def test_a_run_that_was_cut_off_behind_its_checkpoint_writes_no_step_twice(micro_config, whole, tmp_path, monkeypatch):
    """Killed in step 4 while steps are saved every two: what step 3 wrote is removed and written again."""
    folder, forward_backward = tmp_path / "run", Learner.forward_backward

    def interrupted(self, batch, *arguments, **given):
        if batch.from_rollouts and batch.step == 4:
            raise KeyboardInterrupt
        return forward_backward(self, batch, *arguments, **given)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "forward_backward", interrupted)
        patch.setattr(Run, "_save_what_failed", lambda run, error: None)  # a killed process saves nothing
        with pytest.raises(KeyboardInterrupt):
            train(_config(micro_config, folder, "full", **{"checkpoint.every": 2}))
    assert [line["step"] for line in read_metrics(folder)] == [1, 2, 3]
    train(_config(micro_config, folder, "full", **{"checkpoint.every": 2}), resume="auto")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert _untimed(folder) == _untimed(whole("full"))
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [f"step_{i:06d}" for i in (2, 4, 5)]


@pytest.fixture
def finished(whole, tmp_path):
    """A copy of a run that has ended."""
    return Path(shutil.copytree(whole("full"), tmp_path / "run"))


def test_resume_from_a_path_goes_back_and_drops_what_came_later(micro_config, whole, finished):
    path = str(finished / "checkpoints/step_000002")
    with pytest.raises(Stopped):
        train(_config(micro_config, finished, "full"), resume=path, stop_after=3)
    assert list(checkpoint.saved(finished / "checkpoints")) == [1, 2, 3]
    assert [line["step"] for line in read_metrics(finished)] == [1, 2, 3]
    assert not (finished / "rollouts/step_000004.jsonl.zst").exists()
    _assert_same_checkpoint(finished, whole("full"), 3)


def test_resume_of_a_finished_run_takes_no_step_but_those_that_it_is_given(micro_config, finished):
    before = _untimed(finished)
    train(_config(micro_config, finished, "full"), resume="auto")
    assert _untimed(finished) == before
    train(_config(micro_config, finished, "full", steps=STEPS + 1), resume="auto")
    assert [line["step"] for line in read_metrics(finished)] == [1, 2, 3, 4, 5, 6]


CHANGED = {"learner.learning_rate": 0.5, "rollout.group_size": 2, "lora.rank": 4}
DIFFERENCES = (
    r"(?s)(?=.*  learner.learning_rate: 0.01 then, 0.5 now)(?=.*  rollout.group_size: 4 then, 2 now)(?=.*lora)"
)


@pytest.mark.parametrize(
    ("given", "flags", "message"),
    [
        (CHANGED, {"resume": "auto"}, DIFFERENCES),
        ({}, {"resume": "nowhere"}, r"is no checkpoint .*step_000005"),
        ({}, {"force": True}, 'force=True only lets resume go on .* never overwrites a run; add resume="auto"'),
        (
            {"steps": STEPS + 1},
            {"resume": "auto", "stop_after": 5},
            "stop_after=5: the run goes on from step 5; give a later step",
        ),
        ({"steps": 3}, {"resume": "auto", "force": True}, "step_000005 is of step 5, the run ends at step 3"),
    ],
)
def test_a_resume_that_makes_no_sense_is_refused_and_touches_nothing(micro_config, finished, given, flags, message):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    with pytest.raises((ValueError, checkpoint.CheckpointError), match=message) as refusal:
        train(_config(micro_config, finished, "full", **given), **flags)
    assert "checkpoint.every" not in str(refusal.value)
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_a_forced_resume_goes_on_with_the_new_configuration(micro_config, tmp_path, capsys):
    """Its line is short, and its record is not."""
    folder = tmp_path / "run"
    _stop_after(micro_config, folder, "full", 1)
    capsys.readouterr()
    changed = _config(micro_config, folder, "full", **{"learner.learning_rate": 0.5})
    with pytest.raises(Stopped):
        train(changed, resume="auto", force=True, stop_after=2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["resume: step=1", "config_changed: learner.learning_rate=0.01 -> 0.5"]
    assert [line["learner/learning_rate"] for line in read_metrics(folder)] == [1e-2, 0.5]
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events][-3:] == ["resume", "config_changed", "end"]
    assert "versions" in events[-3]["environment"]
    assert "learning_rate: 0.5" in (folder / "config.yaml").read_text()


def test_what_does_not_touch_the_training_may_change(micro_config, whole):
    folder, free = whole("full"), {"checkpoint.every": 4, "checkpoint.keep": 1, "eval.every": 1, "eval.limit": 2}
    free |= {"reward.timeout_s": 3.0, "threads": None, "steps": 9}
    for key, value in free.items():
        refuse_changed_config(folder / "config.yaml", _config(micro_config, folder, "full", **{key: value}))


def test_null_is_a_value_and_not_what_an_older_run_did_not_say(micro_config, tmp_path, monkeypatch):
    """Where the default is no longer null: a run that was begun with null does not go on with the new default."""
    monkeypatch.setattr(resume, "FREE_TO_CHANGE", ("output_dir",))
    config, saved = _config(micro_config, tmp_path, "full", **{"checkpoint.keep": 2}), tmp_path / "config.yaml"
    now = dump_yaml(config)
    assert now.count("  keep: 2\n") == 1
    saved.write_text(now.replace("  keep: 2\n", ""))
    refuse_changed_config(saved, config)
    saved.write_text(now.replace("  keep: 2\n", "  keep: null\n"))
    with pytest.raises(ValueError, match="checkpoint.keep: None then, 2 now"):
        refuse_changed_config(saved, config)


def test_steps_are_part_of_a_schedule_that_decays_over_them(micro_config, tmp_path):
    (tmp_path / "config.yaml").write_text(dump_yaml(_config(micro_config, tmp_path, "cosine")))
    with pytest.raises(ValueError, match="steps: 5 then, 9 now"):
        refuse_changed_config(tmp_path / "config.yaml", _config(micro_config, tmp_path, "cosine", steps=9))


def test_a_forced_resume_with_another_model_loses_nothing(micro_config, finished):
    adapted = _config(micro_config, finished, "full", **{"lora.rank": 4})
    path = str(finished / "checkpoints/step_000002")
    with pytest.raises(ValueError, match="the checkpoint is of another policy"):
        train(adapted, resume=path, force=True)
    assert len(list((finished / "checkpoints").iterdir())) == STEPS


def _lora_on_a_folder(micro_config, micro_policy, tmp_path, sft_steps: int):
    """A LoRA run that was stopped after step 1, its configuration, and the file of the weights that it builds on."""
    model, folder = tmp_path / "model", tmp_path / "run"
    micro_policy(3).save(model)
    given = {"model": str(model), "lora.rank": 4, "sft.steps": sft_steps, "steps": 2}
    given |= {"rollout.max_completion_tokens": 4}
    config = micro_config(folder, **given)
    with pytest.raises(Stopped):
        train(config, stop_after=1)
    return config, (folder / "warm_start" if sft_steps else model) / "model.safetensors"


def _change_one_weight(file: Path) -> None:
    tensors = load_file(file)
    tensors["model.layers.1.self_attn.o_proj.weight"][0, 0] += 1e-3
    save_file(tensors, file, {"format": "pt"})
    if (file.parent / CHECKSUMS).exists():  # changed on purpose, and not damaged
        write_checksums(file.parent)


@pytest.mark.slow
@pytest.mark.parametrize("sft_steps", [pytest.param(0, marks=pytest.mark.long), 2])
def test_adapters_are_continued_on_other_base_weights_by_force_alone(micro_config, micro_policy, tmp_path, sft_steps):
    config, file = _lora_on_a_folder(micro_config, micro_policy, tmp_path, sft_steps)
    original, folder = shutil.copytree(file.parent, tmp_path / "original"), tmp_path / "run"
    _change_one_weight(file)
    named = "SFT stage .*warm_start" if sft_steps else "model='.*model'"
    with pytest.raises(ValueError, match=rf"{named}: the base weights are not those .* of step 1 .*force=True"):
        train(config, resume="auto")
    with pytest.raises(PolicyError, match=r"the base weights are not those .*put back the files"):
        load_found(find_policy(str(folder)), config)
    shutil.copytree(original, file.parent, dirs_exist_ok=True)
    for dtype in ("float32", "bfloat16"):
        load_found(find_policy(str(folder)), config.model_copy(update={"dtype": dtype}))
    shutil.copytree(folder, tmp_path / "stopped")
    train(config, resume="auto")
    assert [line["step"] for line in read_metrics(folder) if "reward/mean" in line] == [1, 2]
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "stopped", folder)
    _change_one_weight(file)
    train(config, resume="auto", force=True)
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "base_changed"] == [1]
    # What is saved from now on belongs to the new base, and an earlier version's checkpoint names none.
    saved = checkpoint.load(folder / "checkpoints/step_000002")
    policy = load_found(find_policy(str(folder / "checkpoints/step_000002")), config, merged=False)
    assert base_changed(policy, saved, "") is None
    del saved.state["base"]
    assert base_changed(micro_policy(0), saved, "") is None


def test_the_checkpoint_of_another_run_brings_its_configuration_along(micro_config, whole, tmp_path):
    """In a folder of its own, the run goes on; nothing says there what the configuration was."""
    reference, folder = whole("full"), tmp_path / "run"
    path = str(reference / "checkpoints/step_000003")
    changed = _config(micro_config, folder, "full", **{"seed": 7, "learner.learning_rate": 0.5})
    with pytest.raises(ValueError, match=r"(?s)was started with .*learner.learning_rate: 0.01 then, 0.5 now.*seed: 0"):
        train(changed, resume=path)
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(ValueError, match="learner.learning_rate: 0.01 then, 0.5 now"):
        train(changed, resume=str(tmp_path / "link"))
    assert not folder.exists()
    with pytest.raises(Stopped):
        train(_config(micro_config, folder, "full"), resume=path, stop_after=4)
    _assert_same_checkpoint(folder, reference, 4)


def test_the_checkpoint_of_another_command_is_refused_and_so_is_what_sft_cannot_go_on_with(
    micro_config, micro_preset, whole, tmp_path
):
    folder = tmp_path / "sft"
    with pytest.raises(Stopped):
        sft(_sft_config(micro_preset, folder, **{"eval.limit": 0}), stop_after=2)
    ours, theirs = whole("full") / "checkpoints/step_000002", folder / "checkpoints/step_000002"
    for force in (False, True):
        with pytest.raises(ValueError, match="step_000002 was saved by another command of quartet"):
            train(_config(micro_config, tmp_path / "run", "full"), resume=str(theirs), force=force)
        with pytest.raises(ValueError, match="step_000002 was saved by another command of quartet"):
            sft(_sft_config(micro_preset, folder), resume=str(ours), force=force)
    with pytest.raises(ValueError, match="prompts_per_step: 4 then, 5 now"):
        sft(_sft_config(micro_preset, folder, **{"prompts_per_step": 5}), resume="auto")
    with pytest.raises(ValueError, match="force=True only lets"):
        sft(_sft_config(micro_preset, folder), force=True)
    with pytest.raises(FileExistsError, match="already holds a run"):
        sft(_sft_config(micro_preset, folder))


def test_other_training_data_are_noticed(micro_config, tmp_path):
    rows = [{"question": f"{i} + 1 = ?", "answer": f"#### {i + 1}"} for i in range(10)]
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"data.name": str(data), "data.limit": None, "steps": 2, "sft.steps": 0}
    with pytest.raises(Stopped):
        train(_config(micro_config, tmp_path / "run", "full", **given), stop_after=1)
    data.write_text("".join(json.dumps(row) + "\n" for row in rows[::-1]))
    with pytest.raises(ValueError, match="the training data have changed since the checkpoint"):
        train(_config(micro_config, tmp_path / "run", "full", **given), resume="auto")


def test_a_damaged_checkpoint_is_named_and_the_one_before_offered(micro_config, whole, finished):
    file = finished / "checkpoints/step_000005/policy.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(checkpoint.CheckpointError, match=r"policy.safetensors.*resume from .*step_000004"):
        train(_config(micro_config, finished, "full"), resume="auto")
    train(_config(micro_config, finished, "full"), resume=str(finished / "checkpoints/step_000004"))
    assert [line["step"] for line in read_metrics(finished)] == [1, 2, 3, 4, 5]
    _assert_same_checkpoint(finished, whole("full"), STEPS)


@pytest.mark.slow
def test_a_full_disk_during_a_save_loses_nothing(micro_config, whole, tmp_path, monkeypatch):
    folder, save_file = tmp_path / "run", tensor_files.save_file

    def full(tensors, values, path):
        if "step_000003" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, values, path)

    with monkeypatch.context() as patch:
        patch.setattr(tensor_files, "save_file", full)
        with pytest.raises(checkpoint.CheckpointError, match=r"step_000003: .*needs \d+ bytes.*make room.*then resume"):
            train(_config(micro_config, folder, "full"))
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step_000001", "step_000002"]
    train(_config(micro_config, folder, "full"), resume="auto")
    _assert_same_checkpoint(folder, whole("full"), STEPS)
    assert _untimed(folder) == _untimed(whole("full"))


# ---- the best checkpoint --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_best_checkpoint_by_accuracy_stays_and_becomes_a_policy(micro_config, tmp_path, monkeypatch):
    """Accuracies 0.1 (before GRPO), 0.3, 0.6, 0.6, 0.2 and 0.5 at the end: step 3 is the latest of the best."""
    accuracies = {0: 0.1, 1: 0.3, 2: 0.6, 3: 0.6, 4: 0.2, 5: 0.5}
    evaluation = RunLog.evaluation

    def told(self, step, results):
        evaluation(self, step, results | {"eval/accuracy": accuracies[step]})

    monkeypatch.setattr(RunLog, "evaluation", told)
    folder = tmp_path / "run"
    given = {"checkpoint.keep_best": True, "checkpoint.keep": 1, "checkpoint.every": 2}
    given |= {"eval.every": 1, "eval.limit": 2}
    with pytest.raises(Stopped):
        train(_config(micro_config, folder, "full", **given), stop_after=4)
    assert list(checkpoint.saved(folder / "checkpoints")) == [3, 4]
    train(_config(micro_config, folder, "full", **given), resume="auto")
    assert list(checkpoint.saved(folder / "checkpoints")) == [3, 5]
    best, last = Policy.load(folder / "best_policy"), Policy.load(folder / "policy")
    kept = checkpoint.load(folder / "checkpoints/step_000003").tensors["policy"]
    parameters = dict(best.named_parameters())
    assert all(parameters[name].equal(tensor) for name, tensor in kept.items() if name in parameters)
    assert not all(q.equal(p) for p, q in zip(best.parameters(), last.parameters(), strict=True))


@pytest.mark.slow
def test_the_best_checkpoint_by_reward_where_nothing_is_evaluated(micro_config, tmp_path):
    folder = tmp_path / "run"
    given = {"checkpoint.keep_best": True, "checkpoint.keep": 1, "checkpoint.every": 2, "steps": 6}
    train(_config(micro_config, folder, "full", **given))
    rewards = [line["reward/mean"] for line in read_metrics(folder)]
    means = {step: rewards[step - 2] + rewards[step - 1] for step in (2, 4, 6)}
    best = max(means, key=means.__getitem__)
    assert list(checkpoint.saved(folder / "checkpoints")) == sorted({best, 6})
    assert (folder / "best_policy/config.json").exists()


def test_best_step():
    lines = [
        {"step": 1, "reward/mean": 0.9},
        {"step": 2, "reward/mean": 0.1, "eval/accuracy": 0.5},
        {"step": 3, "reward/mean": 0.6, "eval/accuracy": None},
        {"step": 4, "reward/mean": 0.5, "eval/accuracy": 0.5},
    ]
    assert best_step(lines, [1, 2, 3, 4]) == 4
    assert best_step(lines, [1, 2, 3]) == 2
    assert best_step(lines, [1, 3]) is None
    assert best_step(lines, [1, 2, 3, 4], window=1) == 1
    assert best_step(lines, [2, 4], window=2) == 4  # 0.5 and 0.55


# ---- quartet sft ----------------------------------------------------------------------------------------------------

SFT = {
    "steps": 6,
    "prompts_per_step": 4,
    "learner.learning_rate": 1e-2,
    "data.task_options.levels": [1],
    "rewards": [{"function": "gsm8k"}],
    "checkpoint.every": 2,
    "checkpoint.keep": None,
    "eval.limit": 3,
    "rollout.max_completion_tokens": 5,
    "rollout.draft_tokens": 2,
    "threads": 1,
    "log.trackers": [],
}


def _sft_config(model: str, folder: Path, **given):
    return load(SftConfig, None, SFT | {"model": model, "output_dir": folder} | given)


@pytest.fixture(scope="module")
def supervised(micro_preset, tmp_path_factory):
    """`supervised(limit)`: the folder of an uninterrupted run over so many examples, made once."""

    @functools.cache
    def folder_of(limit: int) -> Path:
        folder = tmp_path_factory.mktemp("sft") / "run"
        results = sft(_sft_config(micro_preset, folder, **{"data.limit": limit}))
        evaluated = [f"{when}, {how}" for when in ("before", "after") for how in ("sampled", "greedy")]
        assert list(results.evaluations) == evaluated
        return folder

    return folder_of


@pytest.mark.slow
@pytest.mark.parametrize(
    ("k", "limit"), [pytest.param(2, 18, marks=pytest.mark.long), (3, 12), (5, 18)]
)  # 12: an epoch ends behind step 3
def test_contract_9_supervised_fine_tuning_resumes_to_the_same_bits(micro_preset, supervised, tmp_path, k, limit):
    whole, folder, given = supervised(limit), tmp_path / "run", {"data.limit": limit}
    with pytest.raises(Stopped, match=f'stopped after step {k}; go on with resume="auto"'):
        sft(_sft_config(micro_preset, folder, **given), stop_after=k)
    assert not (folder / "policy").exists()
    assert list(checkpoint.saved(folder / "checkpoints")) == [step for step in (2, 4) if step <= k] + [k] * (k % 2)
    sft(_sft_config(micro_preset, folder, **given), resume="auto")
    _assert_same_checkpoint(folder, whole, 6)
    assert _untimed(folder) == _untimed(whole)
    losses = {line["step"]: line["loss/sft"] for line in read_metrics(folder) if "loss/sft" in line}
    assert list(losses) == [1, 2, 3, 4, 5, 6]
    assert losses[6] < losses[1]
    before, after = _tensors(folder, k), _tensors(folder, 6)
    assert sum(not before[name].equal(tensor) for name, tensor in after.items()) > 10
    assert not sft(_sft_config(micro_preset, folder, **given), resume="auto").evaluations  # it was finished


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "name", "call", "error"),
    [
        (Learner, "forward_backward", 4, NonFiniteStep("the loss is nan")),
        (log, "append_line", 5, OSError(28, "No space left on device")),  # two of an evaluation, then one a step
        pytest.param(Update, "make", 4, OSError(28, "No space left on device"), marks=pytest.mark.long),
    ],
)
def test_contract_9_a_failure_in_supervised_fine_tuning_saves_the_last_whole_step(
    micro_preset, supervised, tmp_path, monkeypatch, owner, name, call, error
):
    folder, given = tmp_path / "run", {"checkpoint.every": 100, "data.limit": 18}
    real, calls = getattr(owner, name), []

    def fails(*arguments):
        calls.append(1)
        if len(calls) == call:
            raise error
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fails)
        with pytest.raises(type(error)):
            sft(_sft_config(micro_preset, folder, **given))
    assert list(checkpoint.saved(folder / "checkpoints")) == [3]
    sft(_sft_config(micro_preset, folder, **given), resume="auto")
    _assert_same_checkpoint(folder, supervised(18), 6)
    assert _untimed(folder) == _untimed(supervised(18))


def test_contract_9_supervised_fine_tuning_is_stopped_by_a_signal(micro_preset, tmp_path, monkeypatch):
    forward_backward = Learner.forward_backward

    def interrupted(self, batch, *rest):
        if batch.step == 3:
            signal.raise_signal(signal.SIGINT)
        return forward_backward(self, batch, *rest)

    monkeypatch.setattr(Learner, "forward_backward", interrupted)
    with pytest.raises(Stopped, match='stopped after step 3; go on with resume="auto"'):
        sft(_sft_config(micro_preset, tmp_path / "run", **{"checkpoint.every": 100, "eval.limit": 0}))
    assert list(checkpoint.saved(tmp_path / "run/checkpoints")) == [3]


GONE = [
    ("curriculum", "draft_depth", "1"),
    ("curriculum", "completion_tokens", "5"),
    ("sft", "levels", "[2]"),
    ("mtp", "idle_every", "null"),
    ("loss", "importance_clip_min", "0.5"),
    ("value", "cliprange_value", "0.1"),
]


def test_contract_9_a_run_whose_option_is_gone_is_not_gone_on_with_unnoticed(micro_config, tmp_path, monkeypatch):
    """Only where what is learned would be another thing: a timeout that is gone changes no bit."""
    gone = {f"{section}.{option}": ("it gained nothing", "its default") for section, option, _ in GONE}
    gone |= {"rollout.sync_timeout_s": ("it is bounded", 600.0)}
    monkeypatch.setattr(names, "_removed", lambda: gone)
    config = micro_config(tmp_path)
    file, now = tmp_path / "config.yaml", dump_yaml(config)
    file.write_text(now.replace("rollout:\n", "rollout:\n  sync_timeout_s: 7.0\n"))
    refuse_changed_config(file, config)
    for section, option, value in GONE:
        file.write_text(now.replace(f"\n{section}:\n", f"\n{section}:\n  {option}: {value}\n"))
        said = f"{section}.{option}={value}: it is gone, since "
        with pytest.raises(ValueError, match=re.escape(said) + r"[^\n]*\n.*use --force"):
            refuse_changed_config(file, config)
    monkeypatch.undo()
    file.write_text(now + "cassette: {file: null, mode: replay, faults: {}}\n")
    refuse_changed_config(file, config)
    file.write_text(now + "cassette: {file: answers.jsonl, mode: record, faults: {late: 0.1}}\n")
    with pytest.raises(ValueError, match=r"cassette.file=answers.jsonl: it is gone, since .* with --force asks them"):
        refuse_changed_config(file, config)


def test_contract_9_what_left_after_0_2_is_not_gone_on_with_unnoticed_where_bits_depend_on_it(micro_config, tmp_path):
    config = micro_config(tmp_path)
    file, now = tmp_path / "config.yaml", dump_yaml(config)
    for section, option, value in (
        ("learner", "on_non_finite", "skip"),
        ("rollout", "threads_per_worker", "4"),
        ("rollout", "compile", "off"),
        ("distill", "reward_weight", "0.5"),
        ("data", "held_out_seed", "3"),
    ):
        assert f"\n{section}:\n" in now, section
        file.write_text(now.replace(f"\n{section}:\n", f"\n{section}:\n  {option}: {value}\n"))
        with pytest.raises(
            ValueError, match=rf"{section}.{option}='?{value}'?: it is gone, since [^\n]*\n.*use --force"
        ):
            refuse_changed_config(file, config)
    file.write_text(now.replace("\nrewards:\n- ", "\nrewards:\n- columns: {answer: gold}\n  "))
    assert "columns" in file.read_text()
    with pytest.raises(ValueError, match=r"rewards\[\].columns=.*it is gone, since [^\n]*\n.*use --force"):
        refuse_changed_config(file, config)


def test_a_run_of_0_2_resumes_without_options_that_it_never_read(micro_config, tmp_path):
    """Today they are refused beside these estimators. Where they are read, they may not change."""
    file = tmp_path / "config.yaml"
    for now, unread in (
        ({"loss.advantage": "rloo"}, {"loss.scale_rewards": "none", "value.lam": 0.5, "distill.top_k": 4}),
        ({"loss.loss_type": "reinforce"}, {"loss.importance_sampling_level": "sequence"}),
    ):
        file.write_text(dump_yaml(micro_config(tmp_path, **now, **unread)))
        refuse_changed_config(file, micro_config(tmp_path, **now))
    for then in ({"loss.scale_rewards": "none"}, {"loss.importance_sampling_level": "sequence"}):
        file.write_text(dump_yaml(micro_config(tmp_path, **then)))
        with pytest.raises(ValueError, match=f"{next(iter(then))}: '.*' then"):
            refuse_changed_config(file, micro_config(tmp_path))


def test_contract_9_an_agents_run_that_kept_thoughts_is_not_gone_on_with_unnoticed(micro_config, tmp_path):
    """0.2 kept them by default, and today's agents learn each turn as a server shows it."""
    file = tmp_path / "config.yaml"
    for agent, refused in (("agents.py:once", True), (None, False)):
        config = micro_config(tmp_path, agent=agent)
        for thoughts in ("keep", "fork"):
            file.write_text(dump_yaml(config).replace("\ndata:\n", f"\ndata:\n  thoughts: {thoughts}\n"))
            if refused and thoughts == "keep":
                with pytest.raises(ValueError, match=r"data.thoughts: 'keep' then.*\n.*use --force"):
                    refuse_changed_config(file, config)
            else:
                refuse_changed_config(file, config)

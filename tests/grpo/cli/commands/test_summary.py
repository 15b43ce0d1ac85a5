import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from rich.console import Console
from small_learner import small_learner

from grpo.cli.commands import machine, summary
from grpo.cli.commands.memory_table import DeviceMemory
from grpo.cli.commands.summary import pieces
from grpo.config.run import SftConfig
from grpo.evaluation.evaluate import Evaluation
from grpo.evaluation.held_out import Result
from grpo.train import train
from policies.policy import PolicyError
from policies.presets import VOCABULARY
from rewards.config.options import load
from rewards.config.problems import command_line
from rewards.group_score import RewardFailure
from rollout.group import Completion, DraftStats, Prompt, RolloutGroup

RESULT = Evaluation(
    prompts=10,
    completions=20,
    without_mark=0,
    abstained=0,
    correct=5,
    interval=(0.11, 0.47),
    reward_mean=0.3,
    length_mean=12.5,
    clipped=0.1,
    tokens_per_forward=3.456,
    seconds=2.0,
    tokens_per_second=125.4,
    groups=[],
    by_problem=[0.25] * 10,
)


class Spelt:
    """A tokenizer whose tokens spell as given, in bytes or text."""

    def __init__(self, spelling: dict[int, str | bytes]) -> None:
        self.spelling = {token: text.encode() if isinstance(text, str) else text for token, text in spelling.items()}

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        return b"".join(self.spelling[token] for token in token_ids).decode("utf-8", "replace")


@pytest.fixture
def shown(monkeypatch) -> Console:
    """What the report prints on a terminal of 80 columns: `shown.export_text()`."""
    console = Console(record=True, width=80, force_terminal=False)
    monkeypatch.setattr(summary, "CONSOLE", console)
    return console


def _group(prompt: str = "6 * 7 = ?", **columns) -> RolloutGroup:
    completions = [
        Completion([4, 2, 0], [-0.1, -0.2, -0.3], "42", "stop", 1, DraftStats(1, [2, 2], [1, 0])),
        Completion([4, 1], [-0.1, -1.2], "\x1b[31m41", "length", 1, DraftStats(1, [1, 1], [0, 0])),
    ]
    return RolloutGroup(Prompt("a", f"{prompt}\n", [9], columns), completions)


def test_groups_as_json_is_the_documented_form_to_the_letter():
    draft = {"target_forwards": 1, "fallbacks": 0, "depths": [], "cost": 0.0, "plain_cost": 0.0}
    assert summary.groups_as_json([_group(prompt="6 * 7 = ?"), _group(prompt="text")])[0] == {
        "prompt": "6 * 7 = ?\n",
        "completions": [
            {
                "text": "42",
                "token_ids": [4, 2, 0],
                "logprobs": [-0.1, -0.2, -0.3],
                "finish_reason": "stop",
                "draft": draft | {"drafted": [2, 2], "accepted": [1, 0]},
            },
            {
                "text": "\x1b[31m41",
                "token_ids": [4, 1],
                "logprobs": [-0.1, -1.2],
                "finish_reason": "length",
                "draft": draft | {"drafted": [1, 1], "accepted": [0, 0]},
            },
        ],
    }
    group = _group(**{"prompt": "6 * 7 = ?"})
    group.prompt.columns["prompt"] = "as given"
    assert summary.groups_as_json([group])[0]["prompt"] == "as given"


def test_groups_are_shown_without_the_escapes_that_a_model_may_write(shown):
    summary.groups([_group() for _ in range(6)], Spelt({4: "4", 2: "2", 0: "", 1: "\x1b[31m1"}), limit=4)
    text = shown.export_text()
    assert "... and 2 more groups" in text
    assert text.count("stop, 3 tokens, 2.00 a forward") == 4
    assert text.count("length, 2 tokens, 1.00 a forward") == 4
    assert "\x1b" not in text
    assert "4\\x1b[31m1" in text
    assert "accepted at depth" not in text  # nothing was drafted: no legend


def test_drafted_tokens_are_shown_in_colour_with_a_legend(monkeypatch):
    console = Console(record=True, width=80, force_terminal=True)
    monkeypatch.setattr(summary, "CONSOLE", console)
    group = _group()
    group.completions[0].draft.depths[:] = [0, 1, 0]
    summary.groups([group], Spelt({4: "4", 2: "2", 0: ".", 1: "1"}))
    text = console.export_text(styles=True)
    assert "4\x1b[32m2\x1b[0m." in text
    assert "drafts accepted at depth" in text


def test_a_character_of_several_tokens_stands_with_the_last_of_them():
    tokenizer = Spelt({1: b"a", 2: b"\xc3", 3: b"\xa9", 4: b"b", 5: b"\xff"})
    assert pieces([1, 2, 3, 4], tokenizer) == ["a", "", "é", "b"]
    assert pieces([1, 2], tokenizer) == ["a", "\N{REPLACEMENT CHARACTER}"]
    assert "".join(pieces([1, 5, 4], tokenizer)) == "a\N{REPLACEMENT CHARACTER}b"


def test_the_table_of_evaluations_fits_a_terminal_and_says_what_it_counts(shown):
    whole = replace(RESULT, correct=1234, completions=1319, by_problem=[1234 / 1319], tokens_per_second=12345.6)
    summary.evaluations({"before GRPO, sampled": RESULT, "after GRPO, greedy": whole})
    text = shown.export_text()
    for part in ("5/20", "0.250 (0.11-0.47)", "1234/1319", "0.936", "3.46", "125", "12346"):
        assert part in text
    assert "…" not in text  # nothing is cut
    assert all(len(line.rstrip()) <= 80 for line in text.splitlines())
    [heading] = [line for line in text.splitlines() if "correct" in line]
    for name in ("correct", "accuracy (95 %)", "tokens/forward", "tokens/s"):
        assert name in heading  # each in one piece, on one line
    assert "no mark" not in text
    failure = RewardFailure("mine", "a", 0, "timeout", "no result after 10 s")
    unmarked = replace(RESULT, without_mark=2, failures=[failure])
    summary.evaluations({"sampled": unmarked, "greedy": replace(RESULT, without_mark=1)})
    assert "3 more completions have no mark; rewards failed 1 times" in shown.export_text()


def test_the_summary_shows_results_and_where_things_lie(shown, tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "checkpoints").mkdir()
    summary.summary(Result(tmp_path, None, {"after": RESULT}))
    text = shown.export_text()
    assert "held-out problems" in text
    assert str(tmp_path) in text.replace("\n", "")
    assert "  checkpoints/" in text
    assert "  metrics.jsonl" in text
    assert re.search(r"cores · torch \d", text)


def _gains(folder, *, prompts=400, steps=6, warm_schedule="constant", after=0.55):
    """A run whose training reward rises by .2; its held-out accuracy goes from .5 to `after`."""
    warm = {"steps": 900, "learning_rate": 2e-3, "schedule": warm_schedule}
    options = {"rewards": [{"function": "gsm8k"}], "sft": warm, "learner": {"schedule": "linear"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(options | {"loss": {"beta": 0.0}}))
    rows = [{"step": i + 1, "reward/mean": mean} for i, mean in enumerate([0.30, 0.32, 0.4, 0.4, 0.50, 0.52][:steps])]
    rows += [{"step": s, "eval/accuracy": p, "eval/prompts": prompts} for s, p in ((0, 0.5), (steps, after))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_summary_says_that_only_training_gained_and_what_the_decay_may_account_for(shown, tmp_path):
    summary.summary(Result(_gains(tmp_path), None, {}))
    lines = shown.export_text().splitlines()
    found = [place for place, line in enumerate(lines) if line.startswith("Training reward went")]
    numbers = (
        "Training reward went from 0.310 to 0.510: +0.200 (95 % interval +0.020 to +0.380; 2 steps at either end), and "
        "held-out accuracy from 0.500 to 0.550: +0.050 (95 % interval -0.021 to +0.120; 400 problems)."
    )
    assert [lines[place].startswith(numbers) for place in found] == [True, True]
    assert lines[found[0]].endswith("No gain on held-out problems is shown.")
    assert "an SFT stage of 900 steps at the constant rate 0.002" in lines[found[1]]
    assert lines[found[1] + 1].startswith("  what may help: set sft.schedule: linear")


@pytest.mark.parametrize("given", [{"steps": 5}, {"after": 0.7}])
def test_the_summary_says_nothing_of_a_gain_that_needs_no_word_and_survives_a_damaged_record(shown, tmp_path, given):
    summary.summary(Result(_gains(tmp_path, **given, warm_schedule="linear"), None, {}))
    assert "went from" not in shown.export_text()
    (tmp_path / "held_out.jsonl").write_text("{}\n")
    summary.summary(Result(tmp_path, None, {}))
    assert "not known" in shown.export_text()


def _dry_run(config) -> dict[str, str]:
    report = summary.dry_run(config)
    parts = dict.fromkeys(row["part"] for row in report.tables["memory in GiB, by device"])
    return report.facts | parts | {finding.kind: finding.change for finding in report.findings}


def test_a_dry_run_counts_what_a_run_would_do_and_writes_nothing(shown, micro_config, micro_preset, tmp_path):
    shown.width = 200
    given = {"eval.limit": 7, "steps": 5, "learner.updates_per_batch": 2, "rollout.group_size": 3}
    given |= {"sft.schedule": "constant", "learner.schedule": "linear"}
    rows = _dry_run(micro_config(tmp_path / "r", **given))
    assert "sft.schedule: linear" in rows["rate-decay"]
    assert rows["training examples"] == "24 (word_problems, train)"
    assert rows["held-out examples"] == "7"
    assert rows["SFT stage"] == "3 steps × 4 examples"
    assert rows["steps"] == "5"
    assert rows["prompts per step"] == "4"
    assert rows["completions per step"] == "12 (4 prompts × 3)"
    assert rows["updates per step"] == "2"
    assert rows["completions in all"] == "60"
    assert {"weights", "AdamW moments", "at most, about", "disk: checkpoints", "disk: policies"} <= rows.keys()
    assert rows["disk: checkpoints"].endswith("(5 kept)")  # every step, keep: null
    given = {"model": micro_preset, "output_dir": tmp_path / "r", "data.task_options.levels": [1]}
    rows = _dry_run(load(SftConfig, None, given))
    assert rows["SFT stage"] == "200 steps × 16 examples"
    assert "steps" not in rows
    assert not list(tmp_path.iterdir())


def test_a_dry_run_knows_the_size_of_checkpoints_and_adapters(shown, micro_config, micro_policy, tmp_path):
    """Against a real learner; the estimate's vocabulary is the preset's. The MTP head is saved beside the adapters."""
    shown.width = 160
    given = {"sft.schedule": "linear", "learner.schedule": "linear"}
    rows = _dry_run(micro_config(tmp_path / "r", **{"lora.rank": 4, "steps": 7, "checkpoint.every": 3} | given))
    assert "rate-decay" not in rows
    policy = micro_policy(0)
    total = sum(p.numel() for p in policy.trunk.parameters()) + 2 * 32 * (VOCABULARY - len(policy.tokenizer))
    policy.add_lora(4, 8.0)
    config = micro_config(tmp_path / "r")
    learner = small_learner(policy, config.learner, config.mtp)
    adapters = sum(p.numel() for p in policy.trunk.parameters() if p.requires_grad)
    assert learner.optimizer.param_groups
    assert rows["parameters"] == f"{total / 1e6:,.1f} M, trained {adapters / 1e6:,.1f} M ({adapters / total:.1%})"
    saved = adapters + sum(p.numel() for p in policy.mtp.parameters())
    assert rows["disk: checkpoints"] == f"{3 * 12 * saved / 2**20:,.1f} MiB (3 kept)"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "./nowhere"}, r"model='./nowhere': there is no such folder; presets are .*micro"),
        ({"lora.targets": ["qproj"]}, "lora.targets: 'qproj' matches no module"),
        ({"prompts_per_step": 25}, "prompts_per_step=25, but there are 24"),
        ({"data.template": "{quest}"}, "asks for {quest}"),
        ({"model": "owner/name"}, "model='owner/name' is neither a preset, a checkpoint folder nor a reachable hub id"),
    ],
)
def test_a_dry_run_refuses_what_a_run_would(shown, micro_config, tmp_path, given, message):
    with pytest.raises((ValueError, PolicyError), match=message):
        summary.dry_run(micro_config(tmp_path / "r", **given))
    assert not list(tmp_path.iterdir())


def test_a_dry_run_refuses_the_output_folder_that_a_run_would(shown, micro_config, tmp_path):
    """Occupied, below a file, or where nothing can be made; with the same message, and nothing is left behind."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "taken/checkpoints").mkdir(parents=True)
    unwritable = (tmp_path / "file", tmp_path / "file/below", Path("/proc/r"), tmp_path / ("n" * 300))
    for folder, start in {tmp_path / "taken": "output_dir=", **dict.fromkeys(unwritable, "output_dir: ")}.items():
        said = []
        for refuse in (summary.dry_run, lambda config: train(config)):
            with command_line(), pytest.raises(OSError) as error:
                refuse(micro_config(folder))
            said.append(str(error.value))
        assert said[0] == said[1]
        assert said[0].startswith(f"{start}{folder}")
        assert "choose another" in said[0]
    assert sorted(path.name for path in tmp_path.rglob("*") if path.name != ".lock") == ["checkpoints", "file", "taken"]


def test_a_dry_run_of_a_resume_is_that_of_the_run_that_goes_on(shown, micro_config, tmp_path):
    given = {"steps": 1, "sft.steps": 0}
    train(micro_config(tmp_path / "r", **given))
    summary.dry_run(micro_config(tmp_path / "r", **given), resume="auto")
    with pytest.raises(ValueError, match="prompts_per_step: 4 then, 3 now"):
        summary.dry_run(micro_config(tmp_path / "r", **given, prompts_per_step=3), resume="auto")
    with pytest.raises(FileExistsError, match="already holds a run"):
        summary.dry_run(micro_config(tmp_path / "r", **given))


def test_the_disk_has_room_for_the_best_and_for_an_sft_stage(micro_config, tmp_path):
    def disk(**given):
        run = summary.DryRun(
            micro_config(tmp_path / "r", steps=100, **{"checkpoint.every": 50, "eval.limit": 2} | given), None
        )
        run.report()
        return run.disk

    plain = disk()
    assert disk(**{"checkpoint.keep_best": True, "eval.every": 10}) > plain
    adapters = disk(**{"lora.rank": 2, "sft.steps": 0})
    assert disk(**{"lora.rank": 2, "sft.steps": 200}) > 2 * adapters


@pytest.mark.slow
def test_a_dry_run_holds_its_estimates_against_this_machine(shown, micro_config, tmp_path, monkeypatch):
    def told(total, free, room):
        monkeypatch.setattr(machine, "main_memory", lambda: (total * machine.GIB, free * machine.GIB))
        monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: SimpleNamespace(free=room * machine.GIB))
        report = summary.dry_run(micro_config(tmp_path / "new/run"))
        fitting = [f"{name}: {words}" for name, words in report.facts.items() if name[:7] in ("memory", "disk at")]
        return sorted([*fitting, *(finding.evidence for finding in report.faults)], reverse=True)

    memory, disk = told(total=16, free=8, room=7)
    assert re.fullmatch(r"memory: fits: about .+ GiB are needed, there are 16\.0 GiB, 8\.0 GiB of them free", memory)
    assert disk == f"disk at {tmp_path}: fits: about 0.0 GiB are needed, there are 7.0 GiB"
    memory, disk = told(total=16, free=0.25, room=0.0001)
    assert memory.startswith("memory: fits only when others give some back: about")
    assert disk.startswith(f"disk at {tmp_path}: DOES NOT FIT: about 0.0 GiB are needed, there are 0.0 GiB; ")
    memory, _ = told(total=0.3, free=0.2, room=7)
    assert memory.startswith("memory: DOES NOT FIT when loading in the SFT stage: about")
    assert memory.endswith("use larger devices or a smaller model")  # torch alone needs more


def test_every_worker_counts_and_an_sft_stage_is_over_before_grpo_begins(tmp_path):
    def peak(name, gib, count=1):
        return DeviceMemory(name, count, weights=int(gib * machine.GIB))

    def needed(devices):
        memory = machine.Memory.there(torch.device("cpu"), None)
        verdict, _ = machine.verdicts(devices, memory, tmp_path, 0, lambda: "", "")
        return float(verdict.line.partition("about ")[2].split()[0])

    assert needed([peak("learner and sampler", 2)]) == 2.4
    assert needed([peak("learner", 2), peak("each of 3 workers", 1, 3)]) == pytest.approx(6.6)
    assert needed([peak("SFT stage", 5), peak("learner", 2), peak("the worker", 1)]) == pytest.approx(5.4)


def test_where_a_run_does_not_fit_it_says_at_which_part(tmp_path):
    def told(gib, **given):
        sizes = {name: int(size * machine.GIB) for name, size in given.items()}
        rank = DeviceMemory("each of 8 ranks", 8, **sizes)
        memory = machine.Memory.there(torch.device("cpu"), gib)
        verdict, host, _ = machine.verdicts([rank], memory, tmp_path, 0, lambda: "set this", "")
        assert verdict.fits == (" fits: " in verdict.line)
        assert host == ("main memory: about 3.2 GiB while loading, over all machines ()", True)
        return verdict.line

    held = {"weights": 10, "moments": 20}
    assert told(40, **held, activations=2) == (
        "memory of a device of 40 GiB: fits: about 32.0 GiB are needed, there are 40.0 GiB"
    )
    assert told(40, **held, activations=9) == (
        "memory of a device of 40 GiB: DOES NOT FIT when learning (each of 8 ranks): about 39.0 GiB are needed, there "
        "are 40.0 GiB, and a fifth should stay free; set this"
    )
    for part, given in {
        "loading": {"weights": 33},
        "sampling": held | {"rollout": 3, "activations": 12},
        "learning": held | {"activations": 2, "gathered": 2, "saving": 15},
        "publishing": held | {"publication": 3},
        "saving": held | {"saving": 3},
    }.items():
        line = told(40, **given)
        assert line.startswith(f"memory of a device of 40 GiB: DOES NOT FIT when {part} (each of 8 ranks): about ")
        assert line.endswith("; set this")


def test_the_limit_of_a_container_is_this_machines_memory(tmp_path, monkeypatch):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(machine, "LIMITS", (str(limit), str(tmp_path / "none")))
    whole, _ = machine.main_memory()
    for text, size in (("max", whole), (f"{2**28}", 2**28)):
        limit.write_text(f"{text}\n")
        assert machine.main_memory()[0] == size >= machine.main_memory()[1]


def test_a_result_shows_its_folder_and_the_accuracies(tmp_path):
    found = {"before GRPO, greedy": RESULT, "after GRPO, sampled": RESULT, "after GRPO, greedy": RESULT}
    result = Result(tmp_path, None, found)
    greedy = [f"{when} GRPO, greedy: accuracy {RESULT.accuracy:.3f}" for when in ("before", "after")]
    assert repr(result) == f"Result({str(tmp_path)!r}: {'; '.join(greedy)})"
    assert repr(Result(tmp_path, None, {})) == f"Result({str(tmp_path)!r}: nothing was evaluated)"
    rewarded = Result(tmp_path, None, {"after": replace(RESULT, correct=None, reward_mean=0.25)})
    assert "after: mean reward 0.250" in repr(rewarded)
    assert "groups" not in repr(RESULT)

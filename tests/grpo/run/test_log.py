import errno
import io
import json
import math
import os
import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy
import pytest
import torch
import zstandard
from rich.console import Console

from grpo.config.run import LogOptions
from grpo.run import log as run_log
from grpo.run.hardware import command
from grpo.run.log import Resume, RunLog
from review.findings.detectors import failed
from review.page.run_files import RunFiles
from review.readers.record import Record
from review.readers.run_folder import read_events, read_metrics
from rewards.group_score import GroupScore, RewardFailure
from rewards.records import read_rollouts
from rollout.group import Completion, DraftStats, Prompt, RolloutGroup

ROOT = Path(__file__).parents[3]
CONFIG = "steps: 3\n"


def _open(folder: Path, config: str = CONFIG, resume: Resume | None = None, *, quiet=False, terminal=None, **more):
    """The log of a run, and what it shows."""
    shown = io.StringIO()
    console = Console(file=shown, width=200, force_terminal=terminal, color_system=None)
    options = LogOptions(**{"trackers": []} | more)
    return RunLog(folder, config, options, resume=resume, quiet=quiet, console=console), shown


@pytest.fixture
def of_one_step(tmp_path) -> Path:
    """The folder of a run that has made a step."""
    with _open(tmp_path)[0] as log:
        log.step(1, {"reward/mean": 1.0})
    return tmp_path


def _group(texts=("4", "5"), prompt="2 + 2 ="):
    completions = [
        Completion([7, index, 2], [-0.25, -1.5, -0.125], text, "stop", 3, DraftStats(2, [1], [1]))
        for index, text in enumerate(texts)
    ]
    return RolloutGroup(Prompt("p/0", prompt, [5, 6]), completions)


def _score(rewards=(1.0, None)) -> GroupScore:
    parts, extras = {"exact": list(rewards)}, {"parsed": ["4", None]}
    return GroupScore(list(rewards), parts, extras=extras)


def _events(folder: Path, kind: str) -> list[dict]:
    return [event for event in read_events(folder) if event["event"] == kind]


def test_a_step_is_one_sorted_json_line_and_one_console_line(tmp_path):
    log, shown = _open(tmp_path / "run")
    log.step(1, {"time/step": 1.44, "reward/mean": torch.tensor(0.5), "group/zero_variance": numpy.float32(0.25)})
    # Flushed, so that others can follow the run.
    line = (tmp_path / "run/metrics.jsonl").read_text()
    assert line == '{"step": 1, "group/zero_variance": 0.25, "reward/mean": 0.5, "time/step": 1.44}\n'
    assert shown.getvalue() == "step     1  reward 0.500  zero-variance 25%  1.4 s\n"
    log.close()


def test_a_metric_that_is_no_number_or_not_documented_is_told_of(tmp_path):
    with _open(tmp_path)[0] as log:
        log.step(1, {"loss/policy": math.nan, "loss/kl": math.inf, "reward/mean": 1.0})
        log.step(2, {"reward/meen": 1.0})
        log.step(3, {"reward/meen": 2.0})
        shown = log.console.file.getvalue()
        with pytest.raises(TypeError, match=r"metric reward/mean='high' is not a number"):
            log.step(4, {"reward/mean": "high"})
    first, *others = read_metrics(tmp_path)
    assert first == {"step": 1, "log/not_finite": 2.0, "loss/kl": None, "loss/policy": None, "reward/mean": 1.0}
    assert _events(tmp_path, "not_finite")[0]["metrics"] == ["loss/kl", "loss/policy"]
    assert "not_finite: step=1 metrics=['loss/kl', 'loss/policy']" in shown
    assert [row["reward/meen"] for row in others] == [1.0, 2.0]
    (event,) = _events(tmp_path, "undocumented_metric")
    assert "did you mean 'reward/mean'" in event["error"]


def test_evaluation_joins_the_line_of_its_step(tmp_path):
    with _open(tmp_path)[0] as log:
        log.evaluation(0, {"accuracy": 0.25})
        log.step(1, {"reward/mean": 1.0})
        log.evaluation(1, {"accuracy": 0.5, "time/evaluate": 3.0})
        assert "step     1  eval/accuracy 0.5  time/evaluate 3\n" in log.console.file.getvalue()
    assert read_metrics(tmp_path) == [
        {"step": 0, "eval/accuracy": 0.25},
        {"step": 1, "reward/mean": 1.0, "eval/accuracy": 0.5, "time/evaluate": 3.0},
    ]


@pytest.mark.parametrize(
    ("advantages", "expected"),
    [
        ([[0.5, -0.5], [0.0, None]], [0.5, -0.5, 0.0, None]),
        (torch.tensor([[0.5, -0.5], [0.0, 0.25]]), [0.5, -0.5, 0.0, 0.25]),
        ([[torch.tensor([1.0, 2.0]), [3.0]], numpy.array([1.0, 2.0])], [[1.0, 2.0], [3.0], 1.0, 2.0]),
    ],
)
def test_rollouts_come_back_complete(tmp_path, advantages, expected):
    with _open(tmp_path)[0] as log:
        log.rollouts(2, [_group(), _group(("a", "\ud800\n"))], [_score(), _score((0.0, math.nan))], advantages)
    lines = read_rollouts(tmp_path, 2)
    assert [line["advantage"] for line in lines] == expected
    assert lines[0] == {
        "step": 2,
        "draw": 0,
        "prompt_id": "p/0",
        "prompt": "2 + 2 =",
        "sample": 0,
        "text": "4",
        "token_ids": [7, 0, 2],
        "logprobs": [-0.25, -1.5, -0.125],
        "reward": 1.0,
        "parts": {"exact": 1.0},
        "extras": {"parsed": "4"},
        "advantage": lines[0]["advantage"],
        "finish_reason": "stop",
        "policy_version": 3,
        "draft": asdict(DraftStats(target_forwards=2, drafted=[1], accepted=[1])),
    }
    assert [line["reward"] for line in lines] == [1.0, None, 0.0, None]
    assert lines[3]["text"] == "\ud800\n"
    # Any zstd reads the file, and JSON's strict form reads the lines.
    raw = zstandard.ZstdDecompressor().decompress((tmp_path / "rollouts/step_000002.jsonl.zst").read_bytes())
    for line in raw.decode("ascii").splitlines():
        json.loads(line, parse_constant=pytest.fail)
    assert [path.name for path in (tmp_path / "rollouts").iterdir()] == ["step_000002.jsonl.zst"]
    with pytest.raises(FileNotFoundError, match=r"no rollouts of step 7 in .*; there are steps 2 to 2"):
        read_rollouts(tmp_path, 7)
    with pytest.raises(ValueError, match="zip"):
        log.rollouts(1, [_group()], [_score()], [[0.0]])
    with pytest.raises(ValueError, match="zip"):
        log.rollouts(1, [_group(), _group()], [_score()], [[0.0, 0.0]])


def test_the_table_comes_every_few_steps_and_reads_no_markup(tmp_path, monkeypatch):
    monkeypatch.setattr(run_log, "TABLE_EVERY", 2)
    log, shown = _open(tmp_path, terminal=True)
    group = _group(("[bold]4[/bold]\x1b[31m", "five"), prompt="[red]2 + 2")
    for step in (1, 2, 3, 4):
        log.show_rollouts(step, [group], [_score((1.0, 0.5))], [[0.75, -0.75]])
    text = shown.getvalue()
    assert [f"step {step}:" in text for step in (1, 2, 3, 4)] == [True, True, False, True]
    assert "[bold]4[/bold]\\x1b[31m" in text
    assert "[red]2 + 2" in text
    assert "\x1b[31m" not in text
    assert "+0.750" in text
    assert text.index("[bold]4") < text.index("five"), "the best completion comes first"


def test_contract_6_failures_are_events_all_kept_the_first_few_shown(tmp_path):
    log, shown = _open(tmp_path)
    for index in range(5):
        log.event("reward_error", step=1, **vars(RewardFailure("gsm8k", "p/0", index, "raised", "boom \x1b[2J")))
    events = _events(tmp_path, "reward_error")
    assert [event["sample_index"] for event in events] == [0, 1, 2, 3, 4]
    assert (events[0]["function"], events[0]["kind"], events[0]["message"]) == ("gsm8k", "raised", "boom \x1b[2J")
    assert shown.getvalue().count("reward_error") == 3
    assert "further ones in events.jsonl only" in shown.getvalue()
    assert "\x1b" not in shown.getvalue()


def test_contract_11_the_run_names_hardware_versions_and_command(tmp_path):
    _open(tmp_path)[0].close()
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["hardware"]["cpu"]
    assert environment["hardware"]["cores"] >= 1
    assert environment["hardware"]["memory_gib"] > 0
    assert environment["versions"]["torch"] == torch.__version__
    assert {"python", "transformers", "quartet-rl"} <= environment["versions"].keys()
    assert shlex.split(environment["command"])[-1] == sys.orig_argv[-1]
    assert (tmp_path / "config.yaml").read_text() == CONFIG


@pytest.mark.parametrize("name", ["bin/quartet", "examples/my script.py", "learn.py"])
def test_contract_11_the_recorded_command_runs_when_it_is_pasted(tmp_path, monkeypatch, name):
    program, words = tmp_path / name, ["train", "a b.yaml", "--data.template", "{question}\n$x"]
    program.parent.mkdir(exist_ok=True)
    program.write_text(f"#!{sys.executable} -S\nimport sys\nprint(sys.argv[1:])\n")
    program.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    # The kernel starts a script by its interpreter and its own path; a person types the interpreter and the file.
    typed = [sys.executable, str(program) if name == "bin/quartet" else name]
    for on_the_path in (True, False):
        folders = [str(program.parent), str(Path(sys.executable).parent)] if on_the_path else []
        monkeypatch.setenv("PATH", os.pathsep.join([*folders, "/usr/bin", "/bin"]))
        recorded = command([*typed, *words])
        pasted = subprocess.run(recorded, capture_output=True, text=True, shell=True, check=True)
        assert pasted.stdout == f"{words}\n"
        if name == "bin/quartet":
            assert recorded.startswith("quartet train " if on_the_path else "./bin/quartet train ")
        assert str(tmp_path) not in recorded
    assert command(["python", "-m", "grpo", "train", "x.yaml"]) == "python -m grpo train x.yaml"


def test_a_folder_that_holds_a_run_is_refused_with_three_ways_out(tmp_path):
    _open(tmp_path)[0].close()
    with _open(tmp_path, "steps: 9\n")[0] as log:  # the run in it has failed before its first step
        log.step(1, {"reward/mean": 1.0})
    assert (tmp_path / "config.yaml").read_text() == "steps: 9\n"
    assert not _events(tmp_path, "resume")
    with pytest.raises(FileExistsError, match=rf"{tmp_path} already .*another output_dir.*--resume auto.*delete it"):
        _open(tmp_path)
    assert (tmp_path / "config.yaml").read_text() == "steps: 9\n", "a refusal touches nothing"


def test_contract_9_a_resume_removes_what_came_after_its_checkpoint(tmp_path):
    with _open(tmp_path)[0] as log:
        log.evaluation(0, {"accuracy": 0.0})
        for step in (1, 2, 3):
            log.step(step, {"reward/mean": float(step)})
            log.rollouts(step, [_group()], [_score()], [[0.0, 0.0]])
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 4, "rewa')  # killed while it wrote
    (tmp_path / "rollouts/step_000001.jsonl.partial").write_bytes(b"x")
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1, 2, 3]

    with _open(tmp_path, "steps: 9\n", resume=Resume(2))[0] as log:
        assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1, 2]
        assert [path.name[:11] for path in sorted((tmp_path / "rollouts").iterdir())] == ["step_000001", "step_000002"]
        log.step(3, {"reward/mean": 30.0})
    assert [row.get("reward/mean") for row in read_metrics(tmp_path)] == [None, 1.0, 2.0, 30.0]
    (resume,) = _events(tmp_path, "resume")
    assert (resume["step"], "hardware" in resume["environment"]) == (2, True)
    assert _events(tmp_path, "config_changed")[0]["former"] == CONFIG
    assert (tmp_path / "config.yaml").read_text() == "steps: 9\n"

    with _open(tmp_path, resume=Resume(0))[0]:
        assert read_metrics(tmp_path) == []
        assert not list((tmp_path / "rollouts").iterdir())


def test_a_resumed_log_of_old_names_reads_as_one_series(tmp_path):
    """The line that the disk had refused is part of a checkpoint of 0.2, so it has old names too."""
    (tmp_path / "checkpoints").mkdir()
    first, second = ({"step": step, "group/tied": step / 4} for step in (1, 2))
    (tmp_path / "metrics.jsonl").write_text(json.dumps(first) + "\n")
    for _ in range(2):  # it is written once
        with _open(tmp_path, resume=Resume(2, second))[0]:
            pass
    with _open(tmp_path, resume=Resume(2))[0] as log:
        log.step(3, {"group/zero_variance": 0.75})
    assert [(row["step"], row["group/zero_variance"]) for row in read_metrics(tmp_path)] == [
        (1, 0.25),
        (2, 0.5),
        (3, 0.75),
    ]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_half_a_line_of_a_killed_writer_spoils_no_later_line(tmp_path):
    with _open(tmp_path)[0] as log:
        log.step(1, {"reward/mean": 1.0})
        log.event("signal", name="SIGTERM")
    for name in ("metrics", "events"):
        with (tmp_path / f"{name}.jsonl").open("a") as stream:
            stream.write('{"step": 2, "ti')
    with _open(tmp_path, resume=Resume(1))[0] as log:
        log.step(2, {"reward/mean": 2.0})
    assert [row["reward/mean"] for row in read_metrics(tmp_path)] == [1.0, 2.0]
    assert [event["event"] for event in read_events(tmp_path)] == ["signal", "resume"]


def test_a_run_that_begins_anew_after_a_failure_before_its_first_step_is_not_shown_as_failed(tmp_path):
    with pytest.raises(ZeroDivisionError), _open(tmp_path, "loss: {}\n")[0] as log, log.until_its_end():
        raise ZeroDivisionError
    assert [event["event"] for event in read_events(tmp_path)] == ["end"]
    with _open(tmp_path, "loss: {}\n")[0] as log:
        log.step(1, {"reward/mean": 1.0})
        assert RunFiles(tmp_path).overview()["ended"]["event"] == "begin"
        assert Record(tmp_path).state.endswith("in progress or killed")
        assert failed(Record(tmp_path)) is None


def test_an_evaluation_that_is_made_again_replaces_the_former_one(tmp_path):
    with _open(tmp_path)[0] as log, log.until_its_end():
        log.step(1, {"reward/mean": 1.0})
        log.evaluation(1, {"accuracy": 0.1})
        log.evaluation(1, {"acceptance_depth_1": 0.1})
    for accuracy in (0.2, 0.3):
        with _open(tmp_path, resume=Resume(1))[0] as log, log.until_its_end():
            log.evaluation(1, {"accuracy": accuracy})
            log.evaluation(1, {"acceptance_depth_1": accuracy})  # a second line of the same evaluation stays
            log.step(2, {"reward/mean": 2.0})
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert lines == [
            {"step": 1, "reward/mean": 1.0},
            {"step": 1, "eval/accuracy": accuracy},
            {"step": 1, "eval/acceptance_depth_1": accuracy},
            {"step": 2, "reward/mean": 2.0},
        ]


def test_a_line_that_the_disk_has_refused_is_written_once(tmp_path):
    """And no file that stays the same is written again."""
    line = {"step": 1, "reward/mean": 1.0, "loss/kl": None}
    with _open(tmp_path)[0] as log:
        log.evaluation(0, {"accuracy": 0.0})
    inodes = {name: (tmp_path / name).stat().st_ino for name in ("config.yaml", "environment.json")}
    for _ in range(2):
        with _open(tmp_path, resume=Resume(1, line))[0]:
            assert read_metrics(tmp_path) == [{"step": 0, "eval/accuracy": 0.0}, line]
            assert {name: (tmp_path / name).stat().st_ino for name in inodes} == inodes
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_kill_while_the_configuration_is_written_tears_nothing(of_one_step, monkeypatch):
    kept, replace = (of_one_step / "config.yaml").read_text(), os.replace

    def killed(source, target):
        if str(target).endswith("config.yaml"):
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            _open(of_one_step, "steps: 9\n", resume=Resume(1))
    assert (of_one_step / "config.yaml").read_text() == kept
    assert (of_one_step / ".config.yaml.partial").exists()
    with _open(of_one_step, "steps: 9\n", resume=Resume(1))[0]:
        assert (of_one_step / "config.yaml").read_text() == "steps: 9\n"
        assert not list(of_one_step.rglob("*.partial"))


def test_leftovers_of_a_killed_run_go_when_it_goes_on(of_one_step):
    left = [".policy.partial/x", ".warm_start.partial/x", "checkpoints/.step_000001.removed/x", ".theirs.partial/x"]
    left += ["checkpoints/.step_000003.partial/x", "rollouts/.step_000001.jsonl.zst.partial", ".best_policy.replaced/x"]
    for name in left:
        (of_one_step / name).parent.mkdir(parents=True, exist_ok=True)
        (of_one_step / name).write_text("x")
    with _open(of_one_step, resume=Resume(1))[0]:
        kept = {str(path.relative_to(of_one_step)) for path in of_one_step.rglob("x")}
        assert kept == {"best_policy/x", ".theirs.partial/x"}
        assert not list((of_one_step / "rollouts").glob(".*"))


def test_resume_auto_in_a_fresh_folder_is_a_new_run(tmp_path):
    with _open(tmp_path / "new", resume=Resume(0))[0] as log:
        log.step(1, {"reward/mean": 1.0})
    assert not _events(tmp_path / "new", "resume")
    assert len(read_metrics(tmp_path / "new")) == 1


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    log, _ = _open(tmp_path)

    class Full(io.BytesIO):
        name, fileno = str(tmp_path / "metrics.jsonl"), log._metrics.fileno

        def write(self, data):
            if self.tell() > 20:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data[:10])

    full = Full(b"")
    monkeypatch.setattr(log, "_metrics", full)
    with pytest.raises(OSError, match=r"No space left.*metrics\.jsonl"):
        log.step(1, {"reward/mean": 1.0})
    assert full.getvalue() == b""  # no half a line
    assert log.unwritten == {"step": 1, "reward/mean": 1.0}


def test_progress_draws_on_a_terminal_and_nothing_elsewhere(tmp_path):
    for folder, terminal, quiet in (("a", True, False), ("b", False, False), ("c", True, True)):
        log, shown = _open(tmp_path / folder, quiet=quiet, terminal=terminal)
        with log.progress() as progress:
            task = progress.add_task("sampling [x]", total=256, unit="completions")
            progress.update(task, completed=120)
            progress.refresh()
        assert ("120/256 completions" in shown.getvalue()) == (terminal and not quiet)
        assert bool(shown.getvalue()) == (terminal and not quiet)


def test_quiet_prints_nothing(tmp_path, capsys):
    with RunLog(tmp_path, CONFIG, LogOptions(trackers=[]), quiet=True) as log:
        log.step(1, {"reward/mean": 1.0})
        log.event("signal", name="SIGTERM")
        log.show_rollouts(1, [_group()], [_score()], [[0.0, 0.0]])
    assert capsys.readouterr() == ("", "")


def test_a_terminal_without_unicode_does_not_end_the_run(tmp_path):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with RunLog(tmp_path, CONFIG, LogOptions(trackers=[]), console=Console(file=stream)) as log:
        log.show_rollouts(1, [_group(("Zoë", "五"))], [_score()], [[0.0, 0.0]])
        log.event("signal", name="Zoë")
    stream.seek(0)
    assert "Zo\\xeb" in stream.read()


def test_tensorboard_gets_every_finite_metric_and_forgets_what_a_resume_repeats(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with _open(tmp_path, trackers=None)[0] as log:
        for step in (1, 2, 3):
            log.step(step, {"reward/mean": float(step), "loss/policy": math.nan})
        log.evaluation(3, {"accuracy": 0.5})
    with _open(tmp_path, trackers=["tensorboard"], resume=Resume(2))[0] as log:
        log.step(3, {"reward/mean": 30.0})
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(point.step, point.value) for point in board.Scalars("reward/mean")] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert "loss/policy" not in board.Tags()["scalars"]


def test_a_tracker_that_fails_is_dropped_in_sight_and_the_run_goes_on(tmp_path, monkeypatch):
    class Broken:
        name = "broken"

        def log(self, values, step):
            raise ConnectionError("no network")

    monkeypatch.setattr(run_log, "installed", lambda names: ["broken"])
    monkeypatch.setattr(run_log, "start", lambda *_: Broken())
    with _open(tmp_path)[0] as log:
        log.step(1, {"reward/mean": 1.0})
        log.step(2, {"reward/mean": 2.0})
    assert len(read_metrics(tmp_path)) == 2
    (event,) = _events(tmp_path, "tracker_dropped")
    assert event["error"] == "ConnectionError('no network')"


def test_a_tracker_that_cannot_start_is_named_with_its_own_words(tmp_path, monkeypatch):
    from accelerate import tracking

    class NoKey(tracking.GeneralTracker):
        name, requires_logging_directory, tracker = "nokey", False, None

        def __init__(self, run_name):
            super().__init__()

        def start(self):
            raise RuntimeError("no API key configured")

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "nokey", NoKey)
    monkeypatch.setattr(run_log, "installed", lambda names: ["nokey"])
    with pytest.raises(ValueError, match=r"log\.trackers: nokey cannot start \(no API key configured\)"):
        _open(tmp_path)


def test_a_tracker_that_is_not_there_is_refused_before_the_folder_is_touched(tmp_path):
    with pytest.raises(ValueError, match="log.trackers: 'tensorbord' is not installed"):
        _open(tmp_path / "run", trackers=["tensorbord"])
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_resumes_where_texts_have_another_encoding_by_default(tmp_path):
    """As on Windows, and in a locale without UTF-8: config.yaml was written in UTF-8, and read as the locale says."""
    (tmp_path / "resumed.py").write_text(
        "from pathlib import Path\n"
        "from grpo.run.log import Resume, RunLog\n"
        "for resume in (None, Resume(1)):\n"
        "    with RunLog(Path('run'), 'output_dir: runs/\\u00fcber\\n', quiet=True, resume=resume) as log:\n"
        "        log.step(2 if resume else 1, {'reward/mean': 1.0})\n"
    )
    env = os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "resumed.py"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not [event for event in read_events(tmp_path / "run") if event["event"] == "config_changed"]

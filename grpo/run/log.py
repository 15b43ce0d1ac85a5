"""Everything that a run writes while it goes: metrics, rollouts, events, trackers, and lines for the person watching.

runs/NAME/.lock                             locked while a run writes here; process and host
          config.yaml                       the effective configuration
          environment.json               hardware, versions and command of the start; events has a resume's
          held_out.jsonl                    the problems of the first and the last evaluation; read_problems()
          metrics.jsonl                     {"step": 1, "completion/length_mean": 23.1, ...}; read_metrics()
          rollouts/step_000001.jsonl.zst    one completion a line; read_rollouts()
          events.jsonl                      {"time": "...", "event": "reward_error", ...}
          tensorboard/                      where TensorBoard is installed
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self, SupportsFloat

import zstandard
from rich.console import Console
from rich.progress import Progress

from grpo.config.run import LogOptions
from grpo.run import hardware
from grpo.run.console import progress_bars, sample_table, step_line
from grpo.run.json_lines import append_line, json_line, keep_lines, open_lines, rollout_lines, truncate
from grpo.run.lock import RunLock, refuse_folder
from grpo.run.stop import Stopped
from grpo.run.trackers import installed, log_rollouts, start
from policies.files.atomic import tidy, write_file
from review.readers.run_folder import (
    ENVIRONMENT,
    HELD_OUT,
    TURNS,
    check,
    holds_a_run,
    is_evaluation,
    measured_rows,
    read_events,
)
from rewards.config.json_file import whole_lines
from rewards.config.yaml_file import changed_options
from rewards.console import Terminal, visible
from rewards.group_score import GroupScore
from rewards.records import rollout_path
from rollout.group import RolloutGroup

if TYPE_CHECKING:
    from grpo.run.panel import Panel

SHOWN_PER_EVENT = 3
TABLE_EVERY = 10  # steps; `quartet view` shows every completion
SHOWN_ALWAYS = ("learner", "worker", "validation")  # of which one is not like another
WRITTEN = (
    *("config.yaml", "environment.json", "metrics.jsonl", "rewards.json", "sources.json", "draft_costs.json"),
    *("policy", "best_policy", "warm_start"),
)
WRITTEN_INTO = ("checkpoints", "warm_start_checkpoints", "rollouts")


class Resume(NamedTuple):
    """What a run goes on from: the step of a checkpoint, or 0, which starts over in the same folder."""

    step: int
    unwritten: dict[str, Any] | None = None  # the line of that step, where the disk refused it; see `RunLog.state`


class RunLog:
    """The record of one run in `output_dir`. A context manager; one process writes, others may read meanwhile.

    With `resume` what was written after that step is removed, so that no step is written twice; without it the run is
    new: FileExistsError if there is one already. `lock` is the folder's, if it was taken before; FolderInUse while
    another run has it. ValueError if a tracker is missing. On a terminal a panel is drawn, if `last` names the last
    step. Without one every `options.every`-th step has a line, and so have the first and the last one.
    """

    def __init__(
        self,
        output_dir: Path,
        config_yaml: str,
        options: LogOptions | None = None,
        *,
        last: int | None = None,
        quiet: bool = False,
        resume: Resume | None = None,
        lock: RunLock | None = None,
        console: Console | None = None,
    ) -> None:
        # Everything that can be refused is refused before the folder is touched.
        self._options = options or LogOptions()
        tracker_names = installed(self._options.trackers)
        refuse_folder(output_dir, resuming=resume is not None)
        self._lock = lock or RunLock(output_dir)
        self._lock.lock_folder()
        refuse_folder(output_dir, resuming=resume is not None)  # another run may have begun and ended meanwhile
        resumes = holds_a_run(output_dir)
        self.output_dir = output_dir
        self.console = console or Terminal(quiet=quiet)
        self._quiet = quiet
        self._events_seen: Counter[str] = Counter()
        self._checked: set[str] = set()
        self._last_step: int | None = None
        (output_dir / "rollouts").mkdir(parents=True, exist_ok=True)
        tidy(output_dir, WRITTEN)
        for name in WRITTEN_INTO:
            tidy(output_dir / name)
        if resume:
            truncate(output_dir, resume.step)
        self.unwritten: dict[str, Any] | None = None
        self._metrics, self._events = (open_lines(output_dir / f"{name}.jsonl") for name in ("metrics", "events"))
        former = measured_rows(output_dir / "metrics.jsonl", whole_lines(output_dir / "metrics.jsonl"))
        self._former_evaluations = {line["step"] for line in former if is_evaluation(line)}
        if resume and resume.unwritten is not None:
            from review.readers.old_metrics import with_new_names

            unwritten = with_new_names(resume.unwritten)
            if unwritten not in former:
                append_line(self._metrics, unwritten)
        self._ends_before = self._early_ends(resumes and resume is not None)
        self._describe_run(config_yaml, resume.step if resume and resumes else None)
        self._trackers = [start(name, output_dir, config_yaml, resume.step if resume else 0) for name in tracker_names]
        self._panel: Panel | None = None
        if last is not None and self.console.is_interactive and not quiet:
            from grpo.run.panel import Panel

            self._panel = Panel(self.console, str(output_dir), last, former)
            self._panel.start()

    def step(self, step: int, metrics: Mapping[str, float], *, show: bool = True) -> None:
        """Record the metrics of a step, and show them. A NaN or infinity is written as null, counted."""
        finite = self._record(step, {**metrics, **self._ends_before})
        self._last_step = step
        if self._panel:
            self._panel.step(step, finite)
        elif show:
            self.say(step_line(step, finite))

    def supervised(self, step: int, last: int, metrics: Mapping[str, float]) -> None:
        """Show one in ten steps on gold solutions, or one in fifty."""
        if step == last or step % max(1, min(50, last // 10)) == 0:
            names = [name for name in ("loss/sft", "loss/mtp") if name in metrics]
            shown = "  ".join(f"{name} {metrics[name]:.3f}" for name in names)
            self.say(f"SFT stage {step:4d}/{last}  {shown}")

    def evaluation(self, step: int, results: Mapping[str, float]) -> None:
        """Record held-out results, as `eval/NAME` where a name has no area yet, and show them in one line.

        They replace those of the same step that were there when the run went on.
        """
        if step in self._former_evaluations:  # of a run that was killed before it could tell that it had ended
            self._former_evaluations.remove(step)
            keep_lines(self.output_dir, lambda line: line["step"] != step or not is_evaluation(line))
            self._metrics.close()
            self._metrics = open_lines(self.output_dir / "metrics.jsonl")
        named = {name if "/" in name else f"eval/{name}": value for name, value in results.items()}
        finite = self._record(step, named)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in finite.items())
        self.say(f"step {step:5d}  {shown}")
        if self._panel:
            self._panel.evaluation(step, finite)

    def problems(self, step: int, metric: str, by_problem: Mapping[str, float | None]) -> None:
        """Keep what each held-out problem got, by prompt_id: two evaluations are compared problem by problem."""
        with open_lines(self.output_dir / HELD_OUT) as stream:
            append_line(stream, {"step": step, "metric": metric, "by_problem": dict(by_problem)})

    def rollouts(
        self,
        step: int,
        groups: Sequence[RolloutGroup],
        scores: Sequence[GroupScore],
        advantages: Any,
        draws: Sequence[int] | None = None,
        backend: str | None = None,
        policy_logprobs: Mapping[int, Sequence[float]] | None = None,
    ) -> None:
        """Keep all completions of a step, also when they come again with the learner's log-probabilities, by [group,
        sample] flattened.

        `advantages` [P, G] are numbers, or [P, G, Lc] one for every token, as lists, tensors or arrays. `draws` [P]:
        0, or the refill of dynamic sampling that a group comes from.
        """
        advantages = [_plain(row) for row in advantages]
        lines = rollout_lines(groups, scores, advantages, policy_logprobs)
        head = {"step": step} | ({"backend": backend} if backend else {})
        drawn: list[int] = []
        for draw, group in zip(draws or [0] * len(groups), groups, strict=True):
            drawn += [draw] * len(group.completions)
        text = "".join(json_line({**head, "draw": draw, **line}) for draw, line in zip(drawn, lines, strict=True))
        write_file(rollout_path(self.output_dir, step), zstandard.compress(text.encode()))

    def remove_rollouts(self, step: int) -> None:
        """Remove the completions of a step that begins again after its first attempt was undone."""
        rollout_path(self.output_dir, step).unlink(missing_ok=True)

    def show_rollouts(
        self, step: int, groups: Sequence[RolloutGroup], scores: Sequence[GroupScore], advantages: Any
    ) -> None:
        """Now and then show a few completions of a batch."""
        if step == 1 or step % TABLE_EVERY == 0:
            advantages = [_plain(row) for row in advantages]
            self.console.print(sample_table(step, groups, scores, advantages, encoding=self.console.encoding))
            lines = rollout_lines(groups, scores, advantages)
            self._track(lambda tracker: log_rollouts(tracker, step, lines))

    def event(self, event: str, /, *, unshown: Mapping[str, Any] | None = None, **fields: object) -> None:
        """Record what does not happen every step (a failure, a resume, a signal); show the first few of each.

        `unshown` goes into the record alone.
        """
        self._write_event(event, fields | dict(unshown or {}))
        self._events_seen[event] += event not in SHOWN_ALWAYS
        if self._events_seen[event] > SHOWN_PER_EVENT:
            return
        text = " ".join(f"{name}={value}" for name, value in fields.items())
        if self._events_seen[event] == SHOWN_PER_EVENT:
            event += " (further ones in events.jsonl only)"
        self.say(f"{event}: {text}")

    def _write_event(self, event: str, fields: Mapping[str, Any]) -> None:
        append_line(self._events, {"time": datetime.now(UTC).isoformat(), "event": event} | dict(fields))

    def nothing_learned(self, step: int, why: str, change: Sequence[str]) -> None:
        """Record and show that the steps up to this one taught nothing: the reason, and a line for every way out."""
        self.event("nothing_learned", step=step, why=why, unshown={"change": list(change)})
        for way in change:
            self.say(f"  what may help: {way}")

    def state(self) -> dict[str, Any]:
        """Gives what a checkpoint keeps of the log: the line of its step, where the disk has refused it. All others are
        on the disk then."""
        for stream in (self._metrics, self._events):
            os.fsync(stream.fileno())
        return {} if self.unwritten is None else {"unwritten": self.unwritten}

    @contextmanager
    def until_its_end(self) -> Iterator[None]:
        """Records how the run inside ends: the event `end`, and run/finished for the trackers. Steps after a resume
        count in run/* how often the run ended before its time. Errors pass through."""
        try:
            yield
        except BaseException as error:
            with suppress(OSError):  # on a full disk the user needs to read what ended the run, not what the disk said
                self._end(error)
            raise
        self._end(None)

    def _end(self, error: BaseException | None) -> None:
        how = "finished" if error is None else "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        how = "stopped" if isinstance(error, Stopped) else how
        why = {} if error is None else {"error": f"{type(error).__name__}: {error}"}
        self._write_event("end", {"how": how, "after_step": self._last_step} | why)
        finished = {"run/finished": float(how == "finished")}
        self._track(lambda tracker: tracker.log(finished, step=self._last_step or 0))

    def _early_ends(self, resumes: bool) -> dict[str, float]:
        """Counts how often the run ended before its time, by run/* metric; empty where it never did. What was killed
        has no event `end` before the next `resume`, which this process has yet to write."""
        events = [event for event in read_events(self.output_dir) if event["event"] in TURNS]
        ends = Counter(event.get("how") for event in events if event["event"] == "end")
        turns = [event["event"] for event in events] + ["resume"] * resumes
        killed = sum(turn == "resume" and before != "end" for before, turn in pairwise(["begin", *turns]))
        counts = {"run/interruptions": ends["stopped"] + ends["interrupted"], "run/failures": ends["failed"]}
        counts["run/killed"] = killed
        return {name: float(count) for name, count in counts.items() if count}

    def progress(self) -> AbstractContextManager[Progress]:
        """Live bars; see console.progress_bars. Without a terminal, or quiet, they draw nothing."""
        return self._panel.progress() if self._panel else progress_bars(self.console, enabled=not self._quiet)

    def note(self, text: str) -> bool:
        """Show a line in the panel until the run ends; whether there is a panel. Handlers of signals may call this."""
        if self._panel:
            self._panel.note(text)
        return self._panel is not None

    def close(self) -> None:
        if self._panel:
            self._panel.stop()
        for tracker in self._trackers:
            tracker.finish()
        self._trackers = []
        self._metrics.close()
        self._events.close()
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def say(self, text: str) -> None:
        """One line for the person watching."""
        text = visible(text, 400, self.console.encoding)
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _describe_run(self, config_yaml: str, resume_step: int | None) -> None:
        file, here = self.output_dir / "config.yaml", hardware.describe()
        if resume_step is None:
            if any(event["event"] == "end" for event in read_events(self.output_dir)):
                self._write_event("begin", {})  # after one that ended before its first step
            write_file(self.output_dir / ENVIRONMENT, json.dumps(here, indent=1) + "\n")
        else:
            self.event("resume", step=resume_step, unshown={"environment": here})
            if file.exists():
                if (former := file.read_text(encoding="utf-8")) == config_yaml:
                    return
                changed = changed_options(file, config_yaml)
                shown = {key: f"{then!r} -> {now!r}" for key, (then, now) in changed.items()}
                self.event("config_changed", unshown={"former": former}, **shown)
        write_file(file, config_yaml)

    def _record(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Write one line; returns the finite metrics, sorted by name."""
        values = {name: _number(name, value) for name, value in sorted(metrics.items())}
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        if bad := [name for name in values if name not in finite]:
            finite["log/not_finite"] = len(bad)
            self.event("not_finite", step=step, metrics=bad)
        self.unwritten = {"step": step} | dict(sorted((dict.fromkeys(values) | finite).items()))
        append_line(self._metrics, self.unwritten)
        self.unwritten = None
        self._warn_of_undocumented(values)
        self._track(lambda tracker: tracker.log(dict(finite), step=step))
        return finite

    def _track(self, tell: Callable[[Any], None]) -> None:
        for tracker in list(self._trackers):
            try:
                tell(tracker)
            except Exception as error:  # a tracker must not end the run: it is dropped, in sight
                self._trackers.remove(tracker)
                self.event("tracker_dropped", tracker=tracker.name, error=repr(error))

    def _warn_of_undocumented(self, names: Mapping[str, float]) -> None:
        for name in sorted(names.keys() - self._checked):
            self._checked.add(name)
            try:
                check(name)
            except ValueError as error:
                self.event("undocumented_metric", error=str(error))


class NoLog:
    """The log of a rank that is not the first: whatever it is told, it writes and shows nothing."""

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir

    def progress(self) -> Progress:
        return Progress(disable=True)

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


def _number(name: str, value: SupportsFloat | str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"metric {name}={value!r:.60} is not a number") from error


def _plain(values: Any) -> list[Any]:
    if hasattr(values, "tolist"):
        return values.tolist()
    return [value.tolist() if hasattr(value, "tolist") else value for value in values]

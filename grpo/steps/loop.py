"""One training in one folder: opened, restored, counted, recorded, saved and stopped. Every session has one."""

from __future__ import annotations

import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, cast

import psutil

from grpo.config.run import RunConfig, SftConfig, TrainConfig
from grpo.learner.learner import Learner
from grpo.learner.parallel import ONE_PROCESS, Ranks
from grpo.learner.update import NonFiniteStep
from grpo.run import checkpoint
from grpo.run.checkpoint import Checkpoint
from grpo.run.lock import RunLock
from grpo.run.log import NoLog, Resume, RunLog
from grpo.run.memory_errors import Phase, phase
from grpo.run.resume import saved_state
from grpo.run.reward_record import record_sources, refuse_changed_sources
from grpo.run.sources import Sources
from grpo.run.stop import Stopped, last_words, say_stopping, signals
from grpo.steps.step import Step
from policies.devices import peak_gib
from review.readers.run_folder import best_step, read_metrics
from rewards.config.options import dump_yaml

Config = TypeVar("Config", bound=RunConfig)

KILLED = (
    "quartet: the run has ended without a word: it was killed, by somebody or by the system for want of memory, or it "
    "has crashed, or Ray has ended it, whose raylet has died; go on from the last checkpoint with --resume auto"
)


class Run(Generic[Config]):
    """The steps of a training, and the folder that keeps them.

    Used as a context manager around its steps, it keeps this promise: however the steps end, the last whole one is
    saved before. A step that fails before its first update is undone, one that fails later counts.
    """

    def __init__(
        self,
        config: Config,
        log: RunLog,
        ranks: Ranks,
        *,
        checkpoints: Path | None = None,
        saved: Checkpoint | None,
        last: int,
        stop_after: int | None = None,
        of: str = "",
    ) -> None:
        """The steps up to `last`. `of` names a training inside the run, and completes "stopped after step 3"."""
        self.config, self.log, self.ranks = config, log, ranks
        self.folder, self.saved = config.output_dir, saved
        self.checkpoints = checkpoints or self.folder / "checkpoints"
        self.last, self.stop_after, self.of = last, stop_after, of
        self.inner = bool(of)  # a training inside the run: its steps have no metrics, and the last one is not saved
        self.start = self.step = self.saved_step = saved.step if saved else 0  # `step` is the last whole one
        self.resumes = self.forced = False
        self.sources: Sources | None = None
        self.in_progress: Step | None = None
        self.finish_step: Callable[[], object] = lambda: None  # what is done once a step, if it was not done yet
        self.metrics: defaultdict[str, float] = defaultdict(float)  # of the step in progress
        self._parts: dict[str, Any] = {}
        self._refused = -1  # the last step whose checkpoint the disk refused
        self._before: dict[str, Any] = {}

    # ---- the folder -------------------------------------------------------------------------------------------------

    @classmethod
    @contextmanager
    def open(
        cls,
        config: Config,
        steps: int,
        rewards: Sequence[dict[str, Any]],
        *,
        resume: str | None = None,
        stop_after: int | None = None,
        force: bool = False,
        ranks: Ranks = ONE_PROCESS,
        sources: Sources | None = None,
    ) -> Iterator[Self]:
        """Lock the folder, read what the run goes on from, open its files and listen to signals.

        `rewards` describe the reward functions (`Scorer.describe`), `sources` all other files of the user that the
        result depends on. Everything that can be refused is refused before
        the folder is touched: see `RunLock`, `saved_state`, `refuse_changed_sources` and `RunLog` for the errors.
        """
        with ExitStack() as stack:
            if ranks.first:
                lock = stack.enter_context(RunLock(config.output_dir))
                flags: dict[str, Any] = {"resume": resume, "force": force, "stop_after": stop_after}
                saved = saved_state(config, steps=steps, tell=ranks.from_first, **flags)
                if resume is not None and not force:
                    refuse_changed_sources(config.output_dir, rewards, sources)
                goes_on = None if resume is None else Resume(0)
                if saved:
                    goes_on = Resume(saved.step, saved.state.get("unwritten"))
                run_log = RunLog(
                    config.output_dir, dump_yaml(config), config.log, last=steps, resume=goes_on, lock=lock
                )
                log = stack.enter_context(run_log)
                stack.enter_context(log.until_its_end())
                stack.enter_context(last_words(KILLED))
                stack.enter_context(signals.heard(partial(say_stopping, show=log.note)))
                record_sources(log, rewards, sources)
            else:
                path = ranks.from_first(lambda: None)
                saved = checkpoint.load(path, together=True) if path else None
                log = cast(RunLog, NoLog(config.output_dir))
            run = cls(config, log, ranks, saved=saved, last=steps, stop_after=stop_after)
            run.resumes, run.forced, run.sources = resume is not None, force, sources
            try:
                yield run
            except Stopped as stopped:  # perhaps outside the steps
                stopped.at(run.step)
                raise

    def part(self, name: str, last: int, of: str) -> Run[Config]:
        """A training inside this one, which goes on from its own checkpoints in `name`.

        Its steps are not those of the run: they have no metrics, and the last one is not saved.
        """
        folder = self.folder / name
        newest = self.ranks.from_first(lambda: checkpoint.find(folder, "auto"))
        saved = checkpoint.load(newest, together=True) if newest else None
        part = Run(self.config, self.log, self.ranks, checkpoints=folder, saved=saved, last=last, of=of)
        part.sources = self.sources
        return part

    def restore(self, **parts: object) -> None:
        """Take these parts (learner, prompts, ...) back to the checkpoint, and save them from now on.

        A learner has `state` and `load_state`, with tensors; every other part has `state_dict` and `load_state_dict`.
        It may have `tensors`, which are saved too, and `undo`, which takes a step back that has failed; without that
        its state is asked for before every step. A part that a checkpoint of an older version lacks stays as it is.
        """
        self._parts = parts
        if self.saved:
            self.load(self.saved)
            self.saved_step = self.start
        self.ranks.from_first(lambda: checkpoint.discard_after(self.checkpoints, self.start))

    def load(self, saved: Checkpoint) -> None:
        """Every part takes the state that it had when this was saved; the checkpoint of the last whole step, if there
        is one, has another state."""
        self.saved, self.saved_step = saved, -1
        for name, part in self._parts.items():
            if isinstance(part, Learner):
                part.load_state(saved.tensors, saved.state[name])
            elif name in saved.state:
                part.load_state_dict(saved.state[name])
        if self.in_progress is not None:  # it goes on from here, and goes back to here where it is undone
            self.in_progress.works.clear()
            self._before = self._states_before()

    # ---- the steps --------------------------------------------------------------------------------------------------

    def steps(self) -> Iterator[Step]:
        """The steps that are left, one after the other. Between two of them the run ends if a signal has asked for it.
        A step may become the `last` one before its time. One that an earlier loop has left is ended first."""
        self.settle_step()
        while self.step < self.last:
            step = self.in_progress = Step(self.step + 1)
            self.metrics = step.metrics
            self._before = self._states_before()
            if not self.inner:
                self.log.remove_rollouts(int(step))
            yield step
            if self.in_progress is not step:
                raise RuntimeError(
                    f"step {step} has ended, since the session was finished or another loop over its steps has begun"
                )
            self.finish_step()
            self.step, self.in_progress = int(step), None
            if step < self.last and step == self.stop_after:
                self.save()
                raise Stopped(everywhere=True)
            if step < self.last:
                self.ranks.from_first(signals.check)

    @property
    def now(self) -> int:
        """The step in progress; between steps the last whole one."""
        return self.step if self.in_progress is None else self.in_progress

    @property
    def _learner(self) -> Learner:
        return self._parts["learner"]

    @property
    def _others(self) -> dict[str, Any]:
        return {name: part for name, part in self._parts.items() if not isinstance(part, Learner)}

    def _states_before(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self._others.items() if not hasattr(part, "undo")}

    @property
    def moved(self) -> bool:
        """Tells whether the step in progress has changed the policy."""
        return self.in_progress is not None and self.in_progress.moved

    def refuse_other(self, step: int) -> None:
        """Raises ValueError for another step than the one in progress."""
        if step != self.now:
            raise ValueError(f"step={step}: step {self.now} is in progress; give the one that the loop is in")

    def on_first_rank(self, act: Callable[..., object], *arguments: object, **named: object) -> None:
        """Rank 0 acts, while the others wait. If it fails or is stopped, they end as it does."""
        self.ranks.from_first(lambda: act(*arguments, **named) and None)

    def phase(self, name: Phase) -> AbstractContextManager[None]:
        """Surrounds a part of the step: what lacks memory inside says which options of this run to change."""
        return phase(name, self.config)

    @contextmanager
    def timed(self, name: str, metrics: dict[str, float] | None = None) -> Iterator[None]:
        """Adds the seconds inside to this metric of the step, or of `metrics`."""
        started, metrics = time.perf_counter(), self.metrics if metrics is None else metrics
        yield
        metrics[name] += time.perf_counter() - started

    def learn(
        self, act: Callable[[], dict[str, float]], *, rate: str, batch: Path | None = None, **unshown: object
    ) -> dict[str, float]:
        """Return the metrics that `act` returns, and add them to those of the step. A step that is not finite makes no
        update: NonFiniteStep says what to do. `rate` is the option of the learning rate, `batch` the file that holds
        what was to be learned from, where there are such a file and learner.* options; `unshown` goes into the record
        of events."""
        try:
            with self.phase("learning"):
                metrics = act()
        except NonFiniteStep as error:
            self.log.event("non_finite", step=self.in_progress, error=str(error), batch=str(batch), unshown=unshown)
            where = f"; the batch is in {batch}" if batch else ""
            lower = f"{rate} or learner.max_grad_norm" if batch else rate
            raise NonFiniteStep(
                f"{error}. This update was not made{where}. Lower {lower} and go on with --resume auto --force"
            ) from None
        self.metrics |= metrics  # what fails later leaves a line with them
        return metrics

    def reached(self) -> None:
        """The step in progress counts, whatever fails later."""
        self._learner.update.zero()  # the next rollouts need the memory
        self.step = int(self.refuse_outside())

    def refuse_outside(self) -> Step:
        """The step in progress. Raises RuntimeError where there is none."""
        if self.in_progress is None:
            raise RuntimeError("an update outside of a step of the run: make it inside of `for step in run.steps():`")
        return self.in_progress

    def record(self, more: Mapping[str, float] | None = None) -> None:
        """The line of the step in metrics.jsonl; from here on the step counts. Raises ValueError where it has one."""
        step = self.in_progress
        if step is None or step.recorded:
            raise ValueError(f"step {self.now} has its line in metrics.jsonl already; record a step once, inside of it")
        self.step, step.recorded = int(step), True
        metrics = step.metrics
        metrics |= more or {}
        if self.inner:
            self.log.supervised(self.step, self.last, metrics)
            return
        metrics["time/step"] = time.perf_counter() - step.started
        if step.sampled:
            metrics["completion/tokens"] = float(step.sampled)
        if step.sampled and "time/rollout" in metrics:
            metrics["speed/completion_tokens_per_second"] = step.sampled / metrics["time/rollout"]
        metrics["memory/rss_gib"] = psutil.Process().memory_info().rss / 2**30
        metrics |= {f"memory/{name}_gib": gib for name, gib in peak_gib().items()}
        supervises = isinstance(self.config, SftConfig)
        self.log.step(self.step, metrics, show=not supervises)
        if supervises:
            self.log.supervised(self.step, self.last, metrics)

    # ---- saving -----------------------------------------------------------------------------------------------------

    def save_if_due(self, also: bool = False) -> None:
        """Every `checkpoint.every` steps, at the end, and where `also` says so."""
        at_the_end = self.step == self.last
        if also or (not self.inner if at_the_end else self.step % self.config.checkpoint.every == 0):
            self.save()

    def save(self) -> None:
        if self.saved_step == self.step:
            return
        self._refused = self.step
        if self.sources and self.ranks.first:  # before the checkpoint, which depends on them
            self.sources.keep_up(self.folder)
        best = self.best_step(self.step) if self.ranks.first else None
        protect = [] if best is None else [best]
        checkpoint.save(self.checkpoints, self.step, *self.state(), keep=self.config.checkpoint.keep, protect=protect)
        self.saved_step, self._refused = self.step, -1

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The tensors of all parts, and on rank 0 what JSON takes of them."""
        tensors, state = self._learner.state()
        everything = {}
        if self.ranks.first:
            others = {name: part.state_dict() for name, part in self._others.items()}
            everything = {"learner": state, **others, **self.log.state()}
        for part in self._others.values():
            tensors |= part.tensors() if hasattr(part, "tensors") else {}
        return tensors, everything

    def best_step(self, *being_saved: int) -> int | None:
        """The step of the best checkpoint, which stays; None where none was asked for (`checkpoint.keep_best`)."""
        options = self.config.checkpoint
        if self.inner or not isinstance(self.config, TrainConfig) or not self.config.checkpoint.keep_best:
            return None
        saved = [*checkpoint.saved(self.checkpoints), *being_saved]
        return best_step(read_metrics(self.folder), saved, None if self.config.eval.every else options.every)

    @property
    def ended_before(self) -> bool:
        """Tells whether the run that is resumed had come to its end already."""
        return self.start == self.last and (self.folder / "policy").exists()

    # ---- the end ----------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Every exception goes on, after an event that names the step that is saved. A stop tells it, too. A loop that
        was left by `break` or `return` keeps as much."""
        if getattr(error, "saved", False):
            return
        if error is None and self.in_progress is None:  # the loop has ended by itself, with all that it wanted to save
            return
        of_all = self.ranks.size == 1 or error is None or getattr(error, "everywhere", False)
        self.settle_step(with_others=of_all or isinstance(error, Stopped))
        if error is None:
            self.save()
            return
        if isinstance(error, Stopped):
            self.save()
            if signals.number:
                name, action = signal.Signals(error.number).name, "what was in progress is given up"
                self.log.event("signal", name=name, action=action, saved_step=self.saved_step)
            error.at(self.step, self.of)
            return
        if of_all:  # also `sys.exit()` in a loop
            self._save_what_failed(error)

    def leave(self) -> None:
        """End a step that its loop has left, and save the last whole one."""
        if self.in_progress is not None:
            self.settle_step()
            self.save()

    def settle_step(self, *, with_others: bool = True) -> None:
        """End the step in progress. It is undone where nothing was learned and nothing recorded yet; else it is whole,
        and has its line. `with_others`: every rank does the same, so that they can do together what is done once a
        step."""
        step = self.in_progress
        if step is None:
            return
        if step.moved:  # it was cut short after an update
            self.step = int(step)
        self._learner.drop()  # gradients that wait are the step's
        if self.step != step:
            for name, state in self._before.items():
                self._parts[name].load_state_dict(state)
            for part in self._others.values():
                if hasattr(part, "undo"):
                    part.undo()
        else:
            if with_others:
                self._finish_or_tell(step)
            if not step.recorded:
                self.record()
        self.in_progress = None

    def _finish_or_tell(self, step: Step) -> None:
        try:
            self.finish_step()
        except Exception as error:  # what has ended the step is more important
            self.log.event("unfinished", step=step, error=f"{type(error).__name__}: {error}")

    def _save_what_failed(self, error: BaseException) -> None:
        not_saved: dict[str, Any] = {}
        try:
            if self._refused != self.step:
                self.save()
        except Exception as refusal:  # recorded in the event: the error that ends the run must reach the user
            not_saved = {"not_saved": str(refusal)}
        words = f"{type(error).__name__}: {error}"
        try:
            self.log.event("failed", saved_step=self.saved_step, **not_saved, error=words)
        except OSError as full:  # the error that ends the run is more important than its record
            self.log.say(f"failed: saved_step={self.saved_step} (this event is not recorded: {full})")

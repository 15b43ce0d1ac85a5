"""Ten mistakes, each made with ours and with TRL: what is said, the exit code, and how many steps are lost.

Both runs have the same tiny model, data, reward, eight steps and a checkpoint after every third one. A mistake that
comes late comes in the sixth step, when five are done. Then the mistake is taken away, and the run is resumed as each
side's documentation says. Lost are the steps that were done and are computed again, or all where nothing goes on.
Weights that are not finite are lost too.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.process import Ended, Started, clean

FAULTY = Path(__file__).parent / "faulty"
OTHER_RATE = 2e-4  # twice that of faulty/
STEPS, DONE = 8, 5  # of a run; and how many are done when a late mistake comes
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
START_S = 180.0  # until a run has come to its sixth step, on a slow machine
OFFLINE = ("unshare", "--net", "--map-root-user")
OWN_DISK = ("unshare", "--mount", "--map-root-user")


class Run:
    """A folder with a run of one side in it."""

    def __init__(self, side: str, data: Path, folder: Path, seconds: float, usual: Collection[str] = ()) -> None:
        self.side, self.folder, self.seconds, self.usual = side, folder, seconds, usual
        shutil.copytree(data, folder, dirs_exist_ok=True)
        for file in ("marks.py", "ours.yaml" if side == "ours" else "trl_run.py"):
            shutil.copy(FAULTY / file, folder)

    def command(
        self,
        options: dict[str, Any] | None = None,
        *,
        reward: str = "reward",
        model: str = "model",
        resume: bool = False,
    ) -> list[str]:
        """`options` by the names of the side."""
        options = options or {}
        if self.side == "trl":
            return [sys.executable, "trl_run.py", json.dumps(options), reward, model, *(["resume"] if resume else [])]
        words = [sys.executable, "-m", "grpo", "train", "ours.yaml", "--model", model]
        if reward != "reward":
            words += ["--rewards", json.dumps([{"function": f"marks.py:{reward}"}])]
        words += [word for name, value in options.items() for word in (f"--{name}", json.dumps(value))]
        return [*words, *(["--resume", "auto"] if resume else [])]

    def mistake(self, kind: str) -> None:
        (self.folder / "mistake").write_text(f"{kind} {DONE}")

    def start(self, command: Sequence[str], **environment: str) -> Started:
        return Started(command, cwd=self.folder, environment=environment)

    def to_its_end(self, command: Sequence[str], seconds: float, **environment: str) -> Ended:
        started = self.start(command, **environment)
        try:
            started.wait(seconds)
        finally:
            ended = started.end()
        return ended

    def to_the_sixth_step(self, command: Sequence[str]) -> Started:
        started = self.start(command)
        started.wait(START_S, until=(self.folder / "reached").exists)
        return started

    def steps_seen(self) -> list[int]:
        """How many steps were done, at every call of the reward."""
        log = self.folder / "steps.log"
        return [int(line) for line in log.read_text().split()] if log.exists() else []

    def after(self, ended: Ended, learned: bool = False) -> dict[str, Any]:
        """What is recorded of a run that has ended, and of its resumption where steps were done. `learned` says that
        the step whose reward was called last was taken too."""
        done = STEPS if ended.code == 0 else max(self.steps_seen(), default=-int(learned)) + int(learned)
        found = record(ended, self.folder, self.usual) | {"steps_done": done}
        if done and ended.code != 0:
            found |= self.resume(done)
        elif done:
            kept = last_finite(self.folder)
            found["steps_lost"] = done - kept
            if kept < done:
                found["weights"] = f"the last weights that are finite are those of step {kept}"
        else:
            found["steps_lost"] = 0
        return found

    def resume(self, done: int) -> dict[str, Any]:
        for name in ("mistake", "reached", "steps.log"):
            (self.folder / name).unlink(missing_ok=True)
        ended = self.to_its_end(self.command(resume=True), START_S)
        seen = self.steps_seen()
        found: dict[str, Any] = {"resumed": {"code": ended.code}}
        if ended.code != 0:
            found["resumed"]["message"] = message(ended, self.folder, self.usual)
        elif seen:
            first = went_on_after(seen)
            return found | {"resumed_after_step": first, "steps_lost": max(0, done - first)}
        return found | {"steps_lost": done}


def went_on_after(seen: Sequence[int]) -> int:
    """The first step of the unbroken row that ends the list: quartet tries a reward once before the first step.

    >>> went_on_after([0, 5, 6, 7])
    5
    """
    first = len(seen) - 1
    while first and seen[first - 1] in (seen[first], seen[first] - 1):
        first -= 1
    return seen[first]


def last_finite(folder: Path) -> int:
    """The last step with a checkpoint of finite weights; 0 if there is none."""
    import torch
    from safetensors.torch import load_file

    def number(path: Path) -> int:
        return int(re.findall(r"\d+", path.name)[-1])

    places = [*folder.glob("out/checkpoint-*"), *folder.glob("out/checkpoints/step_*")]
    for place in sorted(places, key=number, reverse=True):
        files = list(place.rglob("*.safetensors"))
        if files and all(
            torch.isfinite(t).all() for f in files for t in load_file(f).values() if t.is_floating_point()
        ):
            return number(place)
    return 0


def said_lines(ended: Ended, folder: Path) -> list[str]:
    """Without progress bars, and without what is before them in a line."""
    lines = (re.sub(r".*\d+%\|.*?\|[^\]]*\]", "", line).strip() for line in clean(ended.said, folder).splitlines())
    return [line for line in lines if line]


def message(ended: Ended, folder: Path, usual: Collection[str] = ()) -> str:
    """The line that says what is wrong: quartet's, or the last one of a traceback; else the first line that a run
    without a mistake does not say (`usual`, without numbers)."""
    lines = said_lines(ended, folder)
    for place, line in enumerate(lines):
        if line.startswith("quartet:") and ended.code != 0:
            return " ".join([line, *lines[place + 1 : place + 2]] if line.endswith(":") else [line])[:400]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt|NotFound)\b", line)]
    if ended.code != 0 and errors:
        return errors[-1][:400]
    new = [line for line in lines if unnumbered(line) not in usual]
    if ended.code == 0:  # what was sampled is new too, and says nothing
        new = [line for line in new if re.search(r"\b(nan|none|warning|error|failed)\b", line, re.IGNORECASE)]
    words = [line for line in new if not line.startswith("{")]  # before the measurements of a step
    return (words or new or ["nothing"])[0][:400]


def unnumbered(line: str) -> str:
    return re.sub(r"[-+]?\d[\d.e+-]*", "#", line)


def record(ended: Ended, folder: Path, usual: Collection[str] = ()) -> dict[str, Any]:
    kind = {None: "it did not end within the limit", 0: "it went on to its end"}.get(ended.code, "it ended")
    return {
        "message": message(ended, folder, usual),
        "exit_code": ended.code,
        "outcome": kind,
        "seconds": round(ended.seconds, 1),
    }


# ---- the mistakes ---------------------------------------------------------------------------------------------------


def typo(run: Run) -> dict[str, Any]:
    name = "learner.learning_rte" if run.side == "ours" else "learning_rte"
    return run.after(run.to_its_end(run.command({name: 1e-5}), run.seconds))


def hanging_reward(run: Run) -> dict[str, Any]:
    """The limit counts from the moment in which the reward begins to hang."""
    run.mistake("hang")
    started = run.to_the_sixth_step(run.command())
    started.wait(run.seconds)
    return run.after(started.end())


def nan_reward(run: Run) -> dict[str, Any]:
    run.mistake("nan")
    return run.after(run.to_its_end(run.command(), START_S))


def full_disk(run: Run) -> dict[str, Any]:
    """The folder has room for what there is after three steps, and for half a checkpoint more."""
    allowed = [*OWN_DISK, "mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", str(run.folder)]
    if shutil.which("unshare") is None or subprocess.run(allowed, capture_output=True).returncode:
        return {"not_tried": "this machine lets nobody mount a small disk"}
    whole = run.to_its_end(run.command({"steps" if run.side == "ours" else "max_steps": 3}), START_S)
    assert whole.code == 0, whole.said
    [last] = [*run.folder.glob("out/checkpoint-3"), *run.folder.glob("out/checkpoints/step_*3")]
    kilobytes = (size(run.folder / "out") + size(last) // 2) // 1024
    shutil.rmtree(run.folder / "out")
    (run.folder / "steps.log").unlink()
    for name in ("out", "kept"):
        (run.folder / name).mkdir()
    script = f'mount -t tmpfs -o size={kilobytes}k tmpfs out; "$@"; code=$?; cp -a out/. kept/; exit $code'
    ended = run.to_its_end([*OWN_DISK, "sh", "-c", script, "sh", *run.command()], START_S)
    (run.folder / "out").rmdir()
    (run.folder / "kept").rename(run.folder / "out")
    return run.after(ended, learned=True)  # it is the checkpoint after a step that cannot be written


def size(folder: Path) -> int:
    return sum(-(-file.stat().st_size // 4096) * 4096 for file in folder.rglob("*") if file.is_file())


def kill_9(run: Run) -> dict[str, Any]:
    run.mistake("wait")
    started = run.to_the_sixth_step(run.command())
    started.process.kill()
    started.wait(run.seconds)
    return run.after(started.end())


def missing_column(run: Run) -> dict[str, Any]:
    return run.after(run.to_its_end(run.command(reward="needs_a_label"), run.seconds))


def wrong_template(run: Run) -> dict[str, Any]:
    """Chat prompts for a model without a chat template."""
    return run.after(run.to_its_end(run.command(model="untemplated"), run.seconds))


def two_runs(run: Run) -> dict[str, Any]:
    """While the first one is in its sixth step, a second one with another learning rate is started in its folder.

    Where both come to their end, one folder holds the last steps of one of them.
    """
    run.mistake("wait")
    patient = {"reward.timeout_s": START_S} if run.side == "ours" else {}
    first = run.to_the_sixth_step(run.command(patient))
    (run.folder / "mistake").unlink()  # the first one has read it
    rate = "learner.learning_rate" if run.side == "ours" else "learning_rate"
    second = run.to_its_end(run.command({rate: OTHER_RATE}), START_S)
    (run.folder / "go").touch()
    first.wait(START_S)
    ended = first.end()
    found = record(second, run.folder, run.usual) | {"first_run": record(ended, run.folder, run.usual)}
    both = second.code == 0 and ended.code == 0
    found |= {"steps_done": 2 * STEPS if both else STEPS, "steps_lost": 0}
    if both:
        found |= {"steps_lost": STEPS, "lost": f"all of one run: {whose(run.folder)}"}
    elif ended.code != 0:
        kept = last_finite(run.folder) if second.code != 0 else 0
        found |= {"steps_lost": DONE - min(kept, DONE), "lost": "the first run has ended of it"}
    return found


def whose(folder: Path) -> str:
    """Which of TRL's two runs has written each checkpoint that is left, by the learning rate in its log."""
    said = []
    for state in sorted(folder.glob("out/checkpoint-*/trainer_state.json")):
        rates = [
            line["learning_rate"] for line in json.loads(state.read_text())["log_history"] if "learning_rate" in line
        ]
        said.append(f"{state.parent.name} is of the {'second' if max(rates) > 0.75 * OTHER_RATE else 'first'}")
    return ", ".join(said)


def ctrl_c(run: Run) -> dict[str, Any]:
    """SIGINT comes to the whole group, as a terminal sends it, while the sixth step waits for its reward."""
    run.mistake("wait")
    started = run.to_the_sixth_step(run.command())
    started.interrupt()
    (run.folder / "go").touch()
    started.wait(run.seconds)
    return run.after(started.end())


def offline(run: Run) -> dict[str, Any]:
    """A model that is at the hub, on a machine whose network is cut off."""
    cut = subprocess.run([*OFFLINE, "true"], capture_output=True).returncode == 0 if shutil.which("unshare") else False
    with tempfile.TemporaryDirectory() as cache:
        command = [*(OFFLINE if cut else ()), *run.command(model=HUB_ID)]
        ended = run.to_its_end(command, run.seconds, HF_HUB_OFFLINE="0" if cut else "1", HF_HOME=cache)
    return run.after(ended) | {"network": "cut off" if cut else "HF_HUB_OFFLINE=1"}


MISTAKES: dict[str, Callable[[Run], dict[str, Any]]] = {
    "a typo in an option": typo,
    "a reward that hangs": hanging_reward,
    "a reward of NaN": nan_reward,
    "a full disk": full_disk,
    "kill -9": kill_9,
    "a missing column": missing_column,
    "no chat template": wrong_template,
    "two runs in one folder": two_runs,
    "Ctrl-C": ctrl_c,
    "offline": offline,
}


def without_a_mistake(side: str, data: Path) -> set[str]:
    """What a run says in which all goes well."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run(side, data, Path(folder), START_S)
        ended = run.to_its_end(run.command(), START_S)
        assert ended.code == 0, ended.said
        return {unnumbered(line) for line in said_lines(ended, Path(folder))}


def make_all(
    data: Path, seconds: float, sides: Sequence[str] = ("ours", "trl"), names: Sequence[str] = tuple(MISTAKES)
) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    usual = {side: without_a_mistake(side, data) for side in sides}
    for name in names:
        for side in sides:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    told = MISTAKES[name](Run(side, data, Path(folder), seconds, usual[side]))
                except (OSError, AssertionError) as error:
                    told = {"not_tried": f"{type(error).__name__}: {clean(str(error), Path(folder))[-400:]}"}
            found.setdefault(name, {})[side] = told
            print(f"{name}, {side}: {json.dumps(told)}", flush=True)
    return found

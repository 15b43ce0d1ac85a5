"""The live panel: its curves and clock, what a real terminal gets, Ctrl-C on one, and a pipe that gets lines alone."""

import os
import pty
import re
import sys
import termios
import threading
import time

import pytest
from copies import Copy
from rich.console import Console

from grpo.config.run import LogOptions
from grpo.run.log import RunLog
from grpo.run.panel import BLOCKS, PLAIN_BLOCKS, Panel, clock, sparkline
from grpo.run.stop import STOPPING
from rewards.console import Terminal

STEP = {
    **{"reward/mean": 0.5, "group/zero_variance": 0.25, "policy/approx_kl": 0.00123, "learner/grad_norm": 0.314},
    **{"time/step": 2.0, "time/rollout": 1.0, "time/learn": 0.9, "speed/completion_tokens_per_second": 1234.0},
}


def test_a_sparkline_goes_from_the_lowest_to_the_highest_value():
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"  # of eight blocks those with the numbers 0, 3.5 rounded to even, 7
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert sparkline([0.7]) == "▁"
    assert sparkline(range(8)) == BLOCKS
    assert sparkline([0, 2, 9, 5], width=2) == "▁█"  # the means 1 and 7
    assert len(sparkline(range(1000), width=40)) == 40
    assert sparkline([0, 1], blocks=PLAIN_BLOCKS) == "_#"


def test_the_clock():
    assert [clock(seconds) for seconds in (0, 42.4, 59.6, 3723)] == ["0:00", "0:42", "1:00", "1:02:03"]


class Screen:
    """A pseudo-terminal of 100 columns, and everything that was written to it so far."""

    def __init__(self) -> None:
        self.master, self.slave = pty.openpty()
        termios.tcsetwinsize(self.slave, (30, 100))
        self.modes, self.raw = termios.tcgetattr(self.slave), b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                self.raw += os.read(self.master, 4096)
            except OSError:  # the other side is closed
                return

    def wait_for(self, text: str, seconds: float = 60, after: str = "") -> None:
        """Until `text` is there, after the last `after`."""
        end = time.monotonic() + seconds
        while text not in self._behind(after):
            assert time.monotonic() < end, f"{text!r} is not in {self.text}"
            time.sleep(0.02)

    def _behind(self, text: str) -> str:
        """What is there behind the last time of this text, nothing before the first."""
        _, found, behind = self.text.rpartition(text) if text else ("", "all", self.text)
        return behind if found else ""

    @property
    def text(self) -> str:
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.raw.decode(errors="replace"))

    def is_sane(self) -> bool:
        """The cursor was not hidden, the screen not switched, and the terminal's modes are those of the beginning."""
        return not re.search(rb"\x1b\[\?(25|1049)", self.raw) and termios.tcgetattr(self.slave) == self.modes


def test_a_terminal_gets_the_panel_and_keeps_its_last_state(tmp_path):
    screen = Screen()
    with os.fdopen(os.dup(screen.slave), "w") as stream:
        console = Terminal(file=stream, _environ={"TERM": "xterm"})
        with RunLog(tmp_path / "demo", "", LogOptions(trackers=[]), last=4, console=console) as log:
            log.evaluation(0, {"accuracy": 0.25})
            log.step(1, STEP)
            with log.progress() as progress:
                task = progress.add_task("step 2: sampling", total=8)
                progress.update(task, completed=3)
                screen.wait_for("step 2: sampling")
                screen.wait_for("3/8")
                assert log.note(STOPPING)
                screen.wait_for("Ctrl-C again ends the run at once")
            log.step(2, STEP | {"reward/mean": 0.75})
            log.event("worker", host="here")
            log.console.print("the end")
    screen.wait_for("the end")
    screen.wait_for("learning 45%\r\n", after="step 2/4")  # the last frame is drawn when the log is closed
    after = screen.text[screen.text.rindex("...", 0, screen.text.rindex("step 2/4")) :]
    assert screen.is_sane()
    assert "step     1  reward" not in screen.text  # a line a step is for pipes
    assert re.search(r"\.\.\.\S*/demo +step 2/4 .* 0:0\d gone, about 0:0\d left", after)
    assert re.search(r"reward +0\.750 +▁█ +0\.500 to 0\.750, step 2", after)
    assert re.search(r"accuracy +0\.250 +▁ +0\.250 to 0\.250, step 0", after)
    assert "zero-variance 25%  approx KL 0.0012  grad norm 0.31  1234 tokens/s  2.0 s" in after
    assert "sampling 50%  learning 45%" in after
    assert "step 2: sampling" not in after  # it is over


def test_former_steps_are_on_the_curve_and_time_left_is_that_of_the_last_steps(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("grpo.run.panel.time.monotonic", lambda: now[0])
    console = Console(force_terminal=True, width=100)
    panel = Panel(console, "demo", 10, [{"step": 1, "reward/mean": 0.25}, {"step": 2, "reward/mean": None}])
    for step, seconds in ((3, 50), (4, 6)):  # the first one has waited for the SFT stage: its own 2 seconds count
        now[0] += seconds
        panel.step(step, STEP)
    with console.capture() as shown:
        console.print(panel._render())
    assert "step 4/10" in shown.get()
    assert "0:56 gone, about 0:24 left" in shown.get()  # 6 steps of (2 + 6) / 2 seconds
    assert "▁██" in shown.get()


def test_a_mean_reward_is_not_called_an_accuracy():
    console = Console(force_terminal=True, width=100)
    panel = Panel(console, "demo", 10, [{"step": 0, "eval/reward_mean": 2.5}, {"step": 1, "reward/mean": 0.25}])
    with console.capture() as shown:
        console.print(panel._render())
    assert "accuracy" not in shown.get()
    assert re.search(r"held-out reward +\S*2\.500", shown.get())


def test_a_pipe_gets_a_line_of_every_step_and_no_control_code(tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as some CI systems set it
    with (
        open(tmp_path / "out", "w") as stream,
        RunLog(
            tmp_path / "run", "", LogOptions(trackers=[]), last=5, console=Terminal(file=stream, color_system=None)
        ) as log,
    ):
        for step in range(1, 6):
            with log.progress() as progress:
                progress.add_task("sampling", total=8)
            log.step(step, STEP)
        assert not log.note("x")
    text = (tmp_path / "out").read_text()
    steps = [int(line.split()[1]) for line in text.splitlines()]
    assert steps == [1, 2, 3, 4, 5]
    assert "\x1b" not in text
    assert "\r" not in text
    line = "step     1  reward 0.500  zero-variance 25%  approx KL 0.0012  grad norm 0.31  1234 tokens/s  2.0 s"
    assert text.splitlines()[0] == line


IN_ITS_TERMINAL = """
import fcntl, runpy, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
runpy.run_module("grpo", run_name="__main__")
"""


@pytest.mark.slow
def test_ctrl_c_on_a_terminal_ends_the_run_in_the_panel_and_leaves_the_terminal_sane(run_words, tmp_path):
    given = {"steps": 5000, "prompts_per_step": 2, "rollout.group_size": 2, "checkpoint.every": 1000}
    command = [sys.executable, "-c", IN_ITS_TERMINAL, *run_words(tmp_path / "run", **given)[2:]]
    screen = Screen()
    ends = {"stdin": screen.slave, "stdout": screen.slave, "stderr": screen.slave, "start_new_session": True}
    process = Copy(command, env=os.environ | {"TERM": "xterm", "COLUMNS": "100"}, **ends)
    try:
        screen.wait_for("step 3/5000", 120)
        os.write(screen.master, b"\x03")
        assert process.wait(60) == 130
    finally:
        process.kill()
    screen.wait_for("go on with --resume auto")
    assert screen.is_sane()
    assert re.search(r"quartet: stopped after step \d+; go on with --resume auto\s*$", screen.text)
    assert screen.text.startswith("loading torch and transformers ...")

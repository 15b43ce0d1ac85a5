"""Foreign text never controls the terminal: not in errors, events, warnings or tables."""

import io
import json
import logging
import re
import subprocess
import sys

from rich.table import Table
from rich.text import Text

from grpo.cli.parse import main
from grpo.config.run import LogOptions
from grpo.run.log import RunLog
from rewards.console import Terminal
from rewards.isolation.output import escaped

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\r\x7f\u202e"
CONTROL = re.compile(r"[^\n\t\x20-\x7e\xa1-\u1fff\u2030-\ud7ff]")


def test_newlines_and_tabs_stay_and_everything_else_is_escaped():
    assert escaped("one\n\ttwo é五") == "one\n\ttwo é五"
    assert escaped(EVIL) == r"\x1b]0;owned\x07\x1b[2J\x9b31m\r\x7f\u202e"
    assert escaped("\ud83d") == r"\ud83d"


def test_an_error_shows_control_characters_and_sends_none(tmp_path, model, capsys):
    files = {
        "mine.py": f"def grade(completions, **_):\n    raise ValueError('first line\\nsecond ' + {EVIL!r})\n",
        "column.jsonl": json.dumps({EVIL: "x", "answer": "#### 5"}) + "\n",
        "cell.csv": f"question,answer\n2 + 3,{EVIL.replace(chr(13), '')}\n",
        "model/config.json": json.dumps({"model_type": f"x{EVIL}"}),
    }
    (tmp_path / "model").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    for hostile in (
        ["--rewards", f"[{{function: '{tmp_path}/mine.py:grade'}}]"],
        ["--data.name", f"{tmp_path}/column.jsonl"],
        ["--data.name", f"{tmp_path}/cell.csv"],
        ["--model", f"{tmp_path}/model"],
        [f"--steps{EVIL}", "3"],
    ):
        words = ["train", "--output_dir", str(tmp_path / "r"), "--threads", "1", "--dry_run"]
        assert main([*words, *([] if "--model" in hostile else ["--model", model]), *hostile]) in (1, 2)
        shown = capsys.readouterr()
        assert shown.err.startswith("quartet: ")
        assert r"\x1b]0;owned\x07" in shown.err
        assert not CONTROL.search(shown.err + shown.out)
        assert ("first line\nsecond " in shown.err) == ("--rewards" in hostile)


def test_tables_titles_and_lines_on_the_terminal_are_only_text():
    stream = io.StringIO()
    console = Terminal(file=stream, force_terminal=True, color_system=None, width=200, legacy_windows=False)
    table = Table(title=f"title {EVIL}")
    table.add_column(f"column {EVIL}")
    table.add_row(f"a string [/red] :smile: {EVIL}")
    table.add_row(Text(f"a text {EVIL}", style="red"))
    console.print(table)
    console.print(f"a line {EVIL}", soft_wrap=True)
    shown = stream.getvalue()
    assert not CONTROL.search(re.sub(r"[\u2500-\u257f]", "", shown))
    assert "[/red] :smile:" in shown
    assert shown.count(r"\x1b]0;owned") == 5


def test_without_a_terminal_and_with_all_standard_files_closed_a_command_does_its_work(tmp_path):
    command = [sys.executable, "-m", "grpo", "reward", "test", "gsm8k"]
    closed = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command]
    assert subprocess.run(closed, timeout=120).returncode == 0


def test_rich_itself_may_still_colour_and_move():
    stream = io.StringIO()
    console = Terminal(file=stream, force_terminal=True, color_system="standard", width=80)
    console.print(Text("red", style="red"))
    console.clear()
    assert stream.getvalue() == "\x1b[31mred\x1b[0m\n\x1b[2J\x1b[H"
    console.show_cursor(False)  # never hidden: a command that is killed could not show it again
    assert "\x1b[?25l" not in stream.getvalue()


def test_events_are_echoed_escaped(tmp_path, capsys):
    with RunLog(tmp_path / "run", "model: tiny\n", LogOptions(trackers=[])) as log:
        assert isinstance(log.console, Terminal)
        log.event("reward_error", message=EVIL)
    assert not CONTROL.search(capsys.readouterr().out)
    [line] = (tmp_path / "run/events.jsonl").read_text().splitlines()
    assert json.loads(line)["message"] == EVIL  # the record keeps what was said


def test_warnings_are_escaped(tmp_path, capsys, monkeypatch):
    assert main(["train", "--nosuch", "1"]) == 2  # what any command does first
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(logging.getLogger(), "handlers", [])  # pytest's own
        logging.getLogger("rewards.scorer").warning("reward failed: %s", EVIL)
    shown = capsys.readouterr().err
    assert shown == f"reward failed: {escaped(EVIL)}\n"

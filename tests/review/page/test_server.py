"""`quartet view` as a browser meets it, and `quartet report`."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import quote

import pytest
import zstandard
from copies import Copy

from grpo.cli.parse import main
from grpo.evaluation.held_out import Result
from review.page.page import self_contained
from review.page.server import unique_names
from rewards.records import read_rollouts, rollout_path

CASE = Path(__file__).parents[2] / "cases/run_to_view"
pytest.importorskip("starlette", reason="needs the extra view")
pytest.importorskip("plotly", reason="needs the extra view")


def _write(folder: Path, step: int, lines: list[dict]) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    rollout_path(folder, step).write_bytes(zstandard.ZstdCompressor().compress(text.encode()))


class Served:
    def __init__(self, *words: str) -> None:
        command = [sys.executable, "-m", "grpo", "view", *words]
        self.process = Copy(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.said = self.process.stdout.readline()
        self.address, self.token = re.search(r"open (http://\S+)/\?token=(\S+)", self.said).groups()

    def get(self, path: str, token: str | None = None) -> tuple[int, bytes, dict]:
        headers = {"x-token": self.token if token is None else token}
        request = urllib.request.Request(f"{self.address}{path}", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, response.read(), dict(response.headers)
        except urllib.error.HTTPError as error:
            return error.code, error.read(), dict(error.headers)

    def ask(self, path: str):
        return json.loads(self.get(f"/api/{path}")[1])

    def end(self, number: int = signal.SIGINT) -> int:
        self.process.send_signal(number)
        try:
            self.rest = self.process.communicate(timeout=30)[0]
        finally:
            self.process.kill()
        return self.process.returncode


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name in ("one", "two"):
        shutil.copytree(CASE, folder / name)
    wrong = {"draft": [1], "logprobs": "no", "versions": {}, "advantage": {"a": 1}, "finish_reason": [2]}
    _write(folder / "two", 4, [line | wrong for line in read_rollouts(CASE, 4)])
    os.remove(rollout_path(folder / "two", 3))
    os.symlink("/dev/zero", rollout_path(folder / "two", 3))
    served = Served(str(folder / "one"), str(folder / "two"))
    yield served
    assert served.end() == 130
    assert served.rest.strip() == "quartet: interrupted"


def test_it_listens_on_this_machine_alone_and_data_need_the_token(served):
    assert served.address.startswith("http://127.0.0.1:")
    for token in ("", "wrong", "é"):
        status, body, _ = served.get("/api/runs", token.encode().decode("latin-1"))
        assert status == 403
        assert "the token is missing or wrong" in json.loads(body)["error"]


def test_every_question_is_answered(served):
    assert served.ask("runs") == ["one", "two"]
    assert [row["step"] for row in served.ask("1/overview?after=2")["rows"]] == [2, 3, 4]
    assert len(served.ask("0/step/2")["groups"]) == 4
    assert served.ask("0/group/2/3")["number"] == 3
    assert served.ask("0/events")[-1]["event"] == "end"
    [first, *_] = served.ask("0/places?prompt=" + quote(served.ask("0/group/2/3")["prompt_id"]))
    assert first["step"] <= 2


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("2/overview", 404, "run=2: there are 2"),
        ("x/overview", 400, "run='x' is no number"),
        ("0/step/99", 404, "no rollouts of step 99"),
        ("0/step/-1", 404, "no rollouts of step -1"),
        ("0/group/1/77", 404, "none with the number 77"),
        ("0/step/" + "9" * 40, 400, "is no number"),
    ],
)
def test_a_wrong_question_gets_an_error(served, path, status, message):
    found, body, _ = served.get(f"/api/{path}")
    assert (found, message in json.loads(body)["error"]) == (status, True)


def test_the_page_loads_nothing_from_elsewhere(served):
    status, page, headers = served.get("/", "")
    assert status == 200
    assert headers["content-security-policy"].startswith("default-src 'self'")
    assert not re.search(rb'(src|href)="(?!/assets/|data:)', page)
    for name in re.findall(rb'(?:src|href)="(/assets/[^"]+)"', page):
        assert served.get(name.decode())[0] == 200
    assert served.get("/assets/..%2f..%2fserver.py")[0] == 404
    assert served.get("/assets/server.py")[0] == 404


def test_a_record_that_no_run_writes_is_shown_or_said(served):
    assert served.get("/api/1/group/4/0")[0] == 200
    status, body, _ = served.get("/api/1/step/3")
    assert (status, "is no plain file" in json.loads(body)["error"]) == (400, True)


class _Scripts(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def test_a_report_is_one_file_in_which_text_stays_text(tmp_path, capsys):
    shutil.copytree(CASE, tmp_path / "run")
    lines = read_rollouts(tmp_path / "run", 4)
    for line in lines:
        line["text"] = line["prompt"] = "</script><script>alert(1)</script><!--"
    _write(tmp_path / "run", 4, lines)
    assert main(["report", str(tmp_path / "run"), "--steps", "2", "4"]) == 0
    written = tmp_path / "run/report.html"
    assert capsys.readouterr().out.strip() == str(written)
    page = _Scripts()
    page.feed(written.read_text(encoding="utf-8"))
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 8  # the answers, Plotly and six of ours
    assert not any("src" in attributes or "href" in attributes for tag, attributes in page.tags if tag != "link")


def test_a_result_is_drawn_as_its_report_which_a_notebook_shows_in_a_frame(tmp_path, monkeypatch):
    shutil.copytree(CASE, tmp_path / "run")
    drawn = Result(tmp_path / "run", None, {}).plot()
    assert drawn.path == tmp_path / "run/report.html"
    shown = _Scripts()
    shown.feed(drawn._repr_html_())
    ((tag, attributes),) = shown.tags
    assert (tag, attributes["sandbox"]) == ("iframe", "allow-scripts allow-downloads")  # of no origin of the notebook's
    base = '\n<base href="about:srcdoc">'  # without it a link would lead to the notebook
    assert base in attributes["srcdoc"]
    assert attributes["srcdoc"].replace(base, "", 1) == drawn.path.read_text(encoding="utf-8")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'quartet-review\[view\]'"):
        Result(tmp_path / "run", None, {}).plot()


def test_answers_come_back_as_they_were():
    answers = {"a": "</script> \u2028 é 😀 <b>", "b": [1.5, None]}
    page = self_contained("<title>", answers)
    embedded = re.search(r'<script type="application/json" id="answers">(.*?)</script>', page, re.DOTALL)[1]
    assert json.loads(embedded) == answers
    assert "<title>&lt;title&gt;</title>" in page


@pytest.mark.parametrize("words", [["view", "nowhere"], ["report", "nowhere"], ["report", ".", "--output", "r.html"]])
def test_a_folder_that_is_no_run_is_named(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 1
    assert f"RUN={words[1]}: " in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_an_address_in_use_is_named(served, capsys):
    port = served.address.rpartition(":")[2]
    assert main(["view", str(CASE), "--port", port]) == 1
    assert f"--port {port}: cannot listen there (Address already in use)" in capsys.readouterr().err


def test_runs_of_the_same_name_are_called_by_the_folders_above_them_too():
    """Their curves would have the same names in the legend."""
    names = unique_names([Path("lr/small/seed-0"), Path("lr/large/seed-0"), Path("demo"), Path("demo")])
    assert names == ["small/seed-0", "large/seed-0", "demo", "demo (2)"]

"""`make figures`: which figures are older than their code, and pieces that go on. Nothing is measured here."""

import json
import shlex
import subprocess

import pytest

from benchmarks import figures
from grpo.cli.parse import build_parser


def test_the_page_has_the_oldest_figures_first_and_those_without_a_script_last():
    rows = [
        ("gone.json", "2026-01-01", None, "python benchmarks/gone.py"),
        ("new.json", "2026-03-01", 0, "python -m benchmarks.peers | x"),
        ("old.json", "2026-02-01", 7, "./.venv/bin/python benchmarks/rollout.py --rows 1 --json out.json"),
    ]
    said = figures.page(rows).splitlines()[-3:]
    assert said == [
        "| old.json | 2026-02-01 | 7 | `python benchmarks/rollout.py --rows 1 ...` |",
        "| new.json | 2026-03-01 | 0 | `python -m benchmarks.peers / ...` |",
        "| gone.json | 2026-01-01 | its script is in the history |  |",
    ]


def test_a_command_says_which_code_it_measures():
    assert figures.code_of("python rollout.py --rows 1") == ["benchmarks/rollout.py", "policies", "rollout"]
    assert figures.code_of("make learn-all") == ["benchmarks/learn", *figures.PRODUCT]
    assert figures.code_of("python3 quartet eval runs/a") == list(figures.PRODUCT)
    assert figures.code_of("python benchmarks/no_such_script.py") == figures.code_of("") == []


@pytest.fixture
def repository(tmp_path):
    """`commit({"a/file": "text"})` in a repository of its own."""

    def commit(files):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        figures.git("add", ".", root=tmp_path)
        settings = ["-c", "user.name=me", "-c", "user.email=me@example.com", "-c", "commit.gpgsign=false"]
        figures.git(*settings, "commit", "-qm", "x", root=tmp_path)

    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    return tmp_path, commit


def test_commits_to_the_code_count_and_others_do_not(repository):
    root, commit = repository
    file = root / "results/a.json"
    text = json.dumps({"deep": [{"command": 'python benchmarks/learner.py "x"'}]})
    commit({"benchmarks/learner.py": "1", "grpo/learner/a.py": "1", "docs/a.md": "1"})
    commit({"results/a.json": text})
    commit({"grpo/learner/a.py": "2"})
    commit({"docs/a.md": "2", "rewards/a.py": "2"})
    commit({"benchmarks/learner.py": "2"})
    name, _, since, command = figures.row_of(file, root)
    assert (name, since, command) == ("a.json", 2, 'python benchmarks/learner.py "x"')
    file.write_text(text + "\n")
    assert figures.row_of(file, root)[1:3] == ("not committed yet", 0)


@pytest.mark.parametrize(("code", "whole"), [("print('end')", True), ("raise(SystemExit(3))", False)])
def test_a_piece_is_whole_when_it_ends_well(code, whole):
    assert figures.measure(f'-c "{code}"') is whole


def test_a_piece_that_says_that_it_goes_on_is_not_whole(tmp_path):
    (tmp_path / "piece.py").write_text("print('40 minutes are over; the same command goes on')")
    assert not figures.measure(str(tmp_path / "piece.py"))


def test_what_was_measured_is_not_measured_again_until_its_code_changes(tmp_path, monkeypatch, capsys):
    asked, states = [], dict.fromkeys(figures.PIECES, "1")
    monkeypatch.setattr(figures, "DONE", tmp_path / "done.json")
    monkeypatch.setattr(figures, "PAGE", tmp_path / "figures.md")
    monkeypatch.setattr(figures, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(figures, "state_of", states.get)
    monkeypatch.setattr(figures, "measure", lambda words: asked.append(words) or words != first)
    monkeypatch.setattr("sys.argv", ["figures"])
    first, second, *_ = figures.PIECES.values()
    figures.main()
    first = None
    figures.main()
    figures.main()
    states[next(iter(states))] = "2"
    figures.main()
    words = next(iter(figures.PIECES.values()))
    assert asked == [words, words, second, words]
    assert "left: peers, task; peers, mistakes; rollouts" in capsys.readouterr().out


def test_the_demo_is_read_from_its_controls(tmp_path, monkeypatch):
    asked = []

    def quartet(words):
        args = build_parser().parse_args(words)
        asked.append(words[0])
        if words[0] == "control":
            (args.run / "control").mkdir(parents=True)
            (args.run / "control/control.json").write_text(json.dumps({"seed": len(asked) // 2}))
        return 0

    monkeypatch.setattr("grpo.cli.parse.main", quartet)
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    monkeypatch.setattr(figures, "state_of", lambda piece: "0123456789")
    for seed in (1, 0):
        figures.demo(seed)
    assert asked == ["train", "control"] * 2
    assert json.loads((tmp_path / "demo.json").read_text())["seeds"] == {"1": {"seed": 1}, "0": {"seed": 2}}


def test_every_piece_is_a_command_that_is_there():
    for words in map(shlex.split, figures.PIECES.values()):
        assert figures.code_of("python " + " ".join(words))[0].startswith("benchmarks/")

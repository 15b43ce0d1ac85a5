"""`make figures` runs its measurements in order. Nothing is measured here."""

import json
import re

import pytest

from benchmarks import figures
from grpo.cli.parse import build_parser


def test_all_figures_are_measured_in_order_or_those_that_are_asked_for(monkeypatch):
    measured = []
    monkeypatch.setattr(figures, "measure", measured.append)
    monkeypatch.setattr(figures, "measure_demo", lambda: measured.append("demo"))
    monkeypatch.setattr("sys.argv", ["figures"])
    figures.main()
    assert measured == [*figures.COMMANDS.values(), "demo"]
    measured.clear()
    monkeypatch.setattr("sys.argv", ["figures", "demo", "peers"])
    figures.main()
    assert measured == ["demo", figures.COMMANDS["peers"]]


def test_a_name_that_is_not_known_is_refused_with_those_that_are(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["figures", "peer"])
    with pytest.raises(SystemExit):
        figures.main()
    assert "no such figures: peer; there are peers, rollouts" in capsys.readouterr().err


def test_a_measurement_that_fails_ends_the_command():
    with pytest.raises(figures.subprocess.CalledProcessError):
        figures.measure("-c 'raise SystemExit(3)'")


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
    monkeypatch.setattr(figures, "SEEDS", range(2))
    figures.measure_demo()
    assert asked == ["train", "control"] * 2
    assert json.loads((tmp_path / "demo.json").read_text())["seeds"] == {"0": {"seed": 1}, "1": {"seed": 2}}


def test_every_command_is_there():
    for words in figures.COMMANDS.values():
        script = re.sub(r"^-m benchmarks\.(\w+)", r"benchmarks/\1", words).split()[0]
        root = figures.RESULTS.parents[1]
        assert (root / script).exists() or (root / f"{script}.py").exists()

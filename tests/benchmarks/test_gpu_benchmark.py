"""`make gpu` without a GPU: what it refuses, what it records of pieces that fail, and its small form as a whole."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/gpu.py"


@pytest.fixture(scope="module")
def gpu():
    spec = importlib.util.spec_from_file_location("benchmark_gpu", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _python(gpu, name: str, code: str, **given):
    return gpu.Piece(name, [sys.executable, "-c", code], **given)


def test_without_a_gpu_it_says_so_and_exits_with_2(gpu, monkeypatch, capsys):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    assert gpu.main() == 2
    assert capsys.readouterr().err == (
        "There is no CUDA device here; `make gpu ARGS=--cpu` runs the same in small without one.\n"
    )


def test_a_piece_that_fails_is_recorded_and_the_others_still_run(gpu, capsys):
    records = gpu.run_all(
        [
            _python(gpu, "good", "print('well')", read=lambda: 42),
            _python(gpu, "bad", "raise SystemExit('the card is on fire')"),
            _python(gpu, "after bad", "", needs="bad"),
            _python(gpu, "unreadable", "", read=lambda: json.loads("{")),
            _python(gpu, "no hub", "raise SystemExit('no hub')", may_be_left_out=True),
            _python(gpu, "after no hub", "", needs="no hub"),
            _python(gpu, "endless", "while True: pass"),
            _python(gpu, "last", "", needs="good"),
        ],
        seconds=6,
    )
    assert records["good"]["result"] == 42
    assert "the card is on fire\nexit code 1" in records["bad"]["error"]
    assert records["after bad"]["left_out"] == "it needs 'bad', which there is not"
    assert "its results cannot be read: JSONDecodeError" in records["unreadable"]["error"]
    assert "no hub" in records["no hub"]["left_out"]
    assert "left_out" in records["after no hub"]
    assert records["endless"]["error"].endswith("it was ended after 2 s")
    assert "result" in records["last"]
    assert "exit code 1" in capsys.readouterr().out


def test_no_piece_starts_when_the_time_is_over(gpu):
    records = gpu.run_all([_python(gpu, "late", "")], seconds=0.5)
    assert records["late"]["error"] == "the 0.00833333 minutes were over; raise --minutes"


def test_figures_and_exit_code_are_those_of_the_pieces(gpu, monkeypatch, tmp_path):
    def step(seconds: float, gib: float):
        return {"seconds": {part: [seconds] for part in ("generate", "learn", "step")}, "peak_memory_gib": gib}

    made = {
        "rollout x: generate": {"tokens_per_second": {"8 rows": 10.0}},
        "rollout x: ours k=0": {"tokens_per_second": {"8 rows": 30.0}},
        "step x: trl": step(6.0, 4.0),
        "step x: ours_mla": step(2.0, 3.0),
    }
    chosen = [_python(gpu, name, "", read=lambda result=result: result) for name, result in made.items()]
    monkeypatch.setattr(gpu, "pieces", lambda *_: iter([*chosen, _python(gpu, "bad", "raise SystemExit(3)")]))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--cpu", "--json", str(tmp_path / "new/gpu.json")])
    assert gpu.main() == 1
    report = json.loads((tmp_path / "new/gpu.json").read_text())
    assert report["failed"] == ["bad"]
    assert {"hardware", "versions", "command", "cards"} <= report["environment"].keys()
    assert report["figures"]["tokens_per_second"] == {"x": {"8 rows": {"generate": 10.0, "ours k=0": 30.0}}}
    assert report["figures"]["ratios_to_trl"]["x"] == {"ours_mla / trl": {"learn": 3.0, "step": 3.0, "memory": 0.75}}
    assert all(piece["command"] for piece in report["pieces"].values())


def test_the_pieces_of_a_gpu_are_all_there_and_their_steps_can_be_parsed(gpu, monkeypatch, tmp_path):
    """What only a GPU runs. The files of benchmarks/ and tests/ are there, and learner.py knows every option."""
    for name in ("models/smollm2-135m-instruct", "models/smollm2-135m-mla", "random"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").touch()
    found = {piece.name: piece for piece in gpu.pieces("cuda", tmp_path, tmp_path / "models")}
    assert list(found)[:3] == ["tests", "prepare smollm2", "prepare 1b"]
    for policy in ("smollm2", "1b"):
        for wanted in ("rollout {}: generate", "rollout {}: ours k=0", "step {}: trl", "step {}: ours_mla"):
            assert found[wanted.format(policy)].one_gpu
    assert "step smollm2: ours_dense" in found
    assert "tests/grpo/test_gpu.py" in found["tests"].command
    assert not found["tests"].one_gpu
    for name, piece in found.items():
        assert piece.needs is None or piece.needs in list(found)[: list(found).index(name)]
        assert name == "tests" or (SCRIPT.parents[1] / piece.command[1]).is_file()
        if name.startswith("step "):
            monkeypatch.setattr(sys, "argv", piece.command[1:])
            assert gpu.benchmark("learner")._arguments().device == "cuda"


def test_a_script_finds_our_packages_and_not_the_files_beside_it():
    """Python puts a script's folder first, and benchmarks/rollout.py is there."""
    code = "import runpy, sys; sys.path.insert(0, sys.argv[1]); runpy.run_path(sys.argv[2])\n"
    code += "import rollout.sampling"
    command = [sys.executable, "-c", code, str(SCRIPT.parent), str(SCRIPT.with_name("learner.py"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.long
def test_the_small_form_runs_every_piece(tmp_path):
    file = tmp_path / "gpu.json"
    command = [sys.executable, str(SCRIPT), "--cpu", "--minutes", "30", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(file.read_text())
    assert report["pieces"]["tests"]["result"]["skipped"] == {}
    assert report["pieces"]["tests"]["result"]["passed"] >= 9
    jobs = report["figures"]["tokens_per_second"]["tiny"]
    assert [set(rates) for rates in jobs.values()] == [{"generate", "ours k=0"}] * 2
    assert set(report["figures"]["ratios_to_trl"]["tiny"]) == {"ours_mla / trl_no_checkpointing"}

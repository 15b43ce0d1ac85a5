"""`make gpu` without a GPU: what it refuses, what it records of pieces that fail, and its small form as a whole."""

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
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


def test_of_tests_that_fail_the_others_are_there(gpu, tmp_path):
    piece = gpu.tests("cpu", tmp_path, "tests", "x")
    assert piece.reads_failures
    (tmp_path / "tests.xml").write_text(
        '<testsuites><testsuite><testcase name="a" time="1"/>'
        '<testcase name="b" time="2"><failure message="no"/></testcase>'
        '<testcase name="c" time="0"><skipped message="none here"/></testcase></testsuite></testsuites>'
    )
    found = piece.read("")
    assert (found["passed"], found["failed"], found["skipped"]) == (1, {"b": "no"}, {"c": "none here"})


@pytest.mark.slow
def test_a_piece_that_fails_is_recorded_and_the_others_still_run(gpu, capsys):
    written = []
    records = gpu.run_all(
        [
            _python(gpu, "good", "print('well')", read=lambda output: [output, 42]),
            _python(gpu, "bad", "raise SystemExit('the card is on fire')"),
            _python(gpu, "after bad", "", needs="bad"),
            _python(gpu, "unreadable", "", read=lambda _: json.loads("{")),
            _python(gpu, "no hub", "raise SystemExit('no hub')", may_be_left_out=True),
            _python(gpu, "after no hub", "", needs="no hub"),
            _python(gpu, "endless", "while True: pass"),
            _python(gpu, "lacking", "", modules=("json", "no_such_package")),
            _python(gpu, "last", "", needs="good"),
        ],
        seconds=6,
        write=lambda records: written.append(list(records)),
    )
    assert [len(names) for names in written] == list(range(1, 10))  # after each piece, not at the end
    assert records["good"]["result"] == ["well", 42]
    assert "the card is on fire\nexit code 1" in records["bad"]["error"]
    assert records["after bad"]["left_out"] == "it needs 'bad', which there is not"
    assert "its results cannot be read: JSONDecodeError" in records["unreadable"]["error"]
    assert "no hub" in records["no hub"]["left_out"]
    assert "left_out" in records["after no hub"]
    assert records["endless"]["error"].endswith("it was ended after 2 s")
    lacks = "not installed here: no_such_package; --wheels FOLDER takes packages from there"
    assert records["lacking"]["left_out"] == lacks
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
    chosen = [_python(gpu, name, "", read=lambda _, result=result: result) for name, result in made.items()]
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
    assert list(found)[:5] == ["kernels", "flex", "tests", "prepare 1b", "decoding"]
    assert [name for name in found if "trl" in name] == list(found)[-4:]
    assert all(found[name].modules == () for name in ("kernels", "flex", "prepare 1b", "decoding", "recorded"))
    for policy in ("smollm2", "1b"):
        for wanted in ("rollout {}: generate", "rollout {}: ours k=0", "step {}: trl", "step {}: ours_mla"):
            assert found[wanted.format(policy)].one_gpu
    assert "step smollm2: ours_dense" in found
    assert "tests/grpo/test_gpu.py" in found["tests"].command
    assert not found["tests"].one_gpu
    for name, piece in found.items():
        assert piece.needs is None or piece.needs in list(found)[: list(found).index(name)]
        assert name.startswith("tests") or (SCRIPT.parents[1] / piece.command[1]).is_file()
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


def _small_form(file: Path) -> dict:
    command = [sys.executable, str(SCRIPT), "--cpu", "--minutes", "30", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(file.read_text())


@pytest.fixture
def hide(tmp_path, monkeypatch):
    """`hide("trl", "ray")`: processes that are started from now on cannot import these packages."""

    def hidden(*names: str) -> None:
        folder = tmp_path / "hidden"
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(
            "import sys\n"
            "from importlib.machinery import PathFinder\n"
            "class Others(PathFinder):\n"
            "    @classmethod\n"
            "    def find_spec(cls, name, *more):\n"
            f"        return None if name.partition('.')[0] in {names} else super().find_spec(name, *more)\n"
            "sys.meta_path[sys.meta_path.index(PathFinder)] = Others\n"
        )
        monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)

    return hidden


@pytest.mark.slow
def test_what_is_missing_is_installed_from_a_folder_of_wheels_and_nowhere_else(gpu, tmp_path, monkeypatch, capsys):
    """The wheel is made here, of a package that no machine has."""
    files = {
        "no_such_package.py": "ANSWER = 42\n",
        "no_such_package-1.dist-info/METADATA": "Metadata-Version: 2.1\nName: no-such-package\nVersion: 1\n",
        "no_such_package-1.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "no_such_package-1.dist-info/RECORD": "",
    }
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels/no_such_package-1-py3-none-any.whl", "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
    monkeypatch.setattr(gpu, "TEST_NEEDS", ("json", "no_such_package"))
    monkeypatch.setattr(gpu, "TRL_NEEDS", ("no_other_package",))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "before")
    gpu.add_wheels(tmp_path / "wheels", tmp_path / "installed")
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"no_such_package: from {tmp_path / 'wheels'}"
    assert "no_other_package" in printed[1]
    assert "No matching distribution" in printed[1]
    code = "import no_such_package; assert no_such_package.ANSWER == 42"
    [record] = gpu.run_all([_python(gpu, "piece", code, modules=("no_such_package",))], seconds=60).values()
    assert "result" in record


@pytest.mark.long
def test_without_what_an_image_may_lack_the_first_pieces_still_say_something(hide, tmp_path):
    """Without pydantic no run can be configured, but kernels, gradients and decoding are looked at."""
    hide("trl", "ray", "datasets", "pydantic", "pydantic_core", "zstandard", "xxhash", "hypothesis")
    report = _small_form(tmp_path / "gpu.json")
    ended = [name for name, piece in report["pieces"].items() if "result" in piece]
    assert ended == ["kernels", "flex", "prepare tiny", "decoding", "recorded"]
    lacks = "not installed here: pydantic, zstandard, xxhash; --wheels FOLDER takes packages from there"
    assert report["pieces"]["resume"]["left_out"] == lacks


@pytest.mark.long
def test_without_trl_ray_and_datasets_every_piece_but_those_of_trl_passes(hide, tmp_path):
    hide("trl", "ray", "datasets")
    pieces = _small_form(tmp_path / "gpu.json")["pieces"]
    [left_out] = [name for name, piece in pieces.items() if "result" not in piece]
    assert left_out == "step tiny: trl_no_checkpointing"
    assert pieces[left_out]["left_out"].startswith("not installed here: datasets, trl; ")


@pytest.mark.long
def test_the_small_form_runs_every_piece(tmp_path):
    report = _small_form(tmp_path / "gpu.json")
    assert report["pieces"]["tests"]["result"]["skipped"] == {}
    assert report["pieces"]["tests"]["result"]["passed"] >= 9
    jobs = report["figures"]["tokens_per_second"]["tiny"]
    assert [set(rates) for rates in jobs.values()] == [{"generate", "ours k=0"}] * 3
    assert set(report["figures"]["ratios_to_trl"]["tiny"]) == {"ours_mla / trl_no_checkpointing"}

"""docs/gpus: the batch file in a SLURM that only writes down what it is asked, and the other files."""

import os
import re
import signal
import stat
import subprocess
import time
import tomllib
from pathlib import Path

import pytest
import yaml

from grpo.config.run import TrainConfig
from rewards.config.options import load

ROOT = Path(__file__).parents[2]
HERE = ROOT / "docs/gpus"


@pytest.fixture
def job(tmp_path):
    """`job(quartet)`: the batch file runs, with programs that note their words; `quartet` is that program's script."""
    notes = tmp_path / "notes"
    programs = {
        "scontrol": 'if [ "$1" = show ]; then echo node1; echo node2; fi',
        "srun": f'case "$*" in *hostname*) echo $SRUN_CPUS_PER_TASK >> {notes}; echo 10.0.0.1;; *) exec sleep 60; esac',
        "python": "exit 0",
    }

    def begin(quartet: str, **others: str) -> subprocess.Popen:
        for name, script in (programs | {"quartet": quartet} | others).items():
            path = tmp_path / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >> {notes}\n{script}\n')
            path.chmod(path.stat().st_mode | stat.S_IXUSR)
        slurm = {"SLURM_JOB_NAME": "quartet", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]"}
        slurm |= {"SLURM_NNODES": "2", "SLURM_CPUS_PER_TASK": "64", "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
        words = [str(HERE / "slurm.sbatch"), "config.yaml", "--steps", "9"]
        return subprocess.Popen(words, cwd=tmp_path, env=os.environ | slurm, stderr=subprocess.PIPE, text=True)

    begin.notes = lambda: notes.read_text().splitlines() if notes.exists() else []
    return begin


# It saves for a second, and a second TERM ends it at once.
WAITS = """
trap 'trap "exit 1" TERM; touch saving; sleep 1; touch saved; exit 143' TERM
touch ready
while true; do sleep 0.1; done
"""


def _until(found, seconds=90):
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGUSR1, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_job_that_slurm_ends_saves_and_is_queued_again_once(job, tmp_path, number):
    process = job(WAITS)
    _until((tmp_path / "ready").exists)
    process.send_signal(number)
    _until((tmp_path / "saving").exists)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert (tmp_path / "saved").exists()
    assert job.notes().count("scontrol requeue 7") == 1
    [line] = [line for line in job.notes() if line.startswith("quartet")]
    assert line == (
        "quartet train config.yaml --output_dir runs/quartet-7 --resume auto --learner.workers 8 --rollout.workers 8 "
        "--steps 9"
    )


def test_a_job_that_ends_or_fails_by_itself_is_not_queued_again(job):
    for code in (0, 1, 143):
        assert job(f"exit {code}").wait(60) == code
    assert not any("requeue" in line for line in job.notes())


def test_a_job_without_all_its_nodes_says_so_and_trains_nothing(job):
    process = job("exit 0", python="exit 1", sleep="exit 0")
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert said.endswith("after 300 s Ray does not have the 2 nodes of this job; what ray start wrote says why\n")
    assert not any(line.startswith("quartet") for line in job.notes())


def test_ray_asks_for_a_token_and_every_node_joins_with_all_processors_of_the_job(job):
    assert job("exit 0").wait(60) == 0
    started = sorted((line for line in job.notes() if "ray start" in line), key=lambda line: "--head" not in line)
    assert re.match(r"srun --nodes=1 --ntasks=1 -w node1 ray start --head --node-ip-address 10.0.0.1 ", started[0])
    assert started[1].startswith("srun --nodes=1 --ntasks=1 --exclude node1 ray start --address 10.0.0.1:6379 ")
    assert "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN" in (HERE / "slurm.sbatch").read_text()
    assert all(" --num-cpus 64 " in line for line in started)
    assert "64" in job.notes()  # what srun reads: since SLURM 22.05 it does not take the number from the job


def test_the_manifest_has_what_kuberay_needs():
    job = yaml.safe_load((HERE / "rayjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"], job["metadata"]["name"]) == ("ray.io/v1", "RayJob", "quartet")
    cluster = job["spec"]["rayClusterSpec"]
    [group] = cluster["workerGroupSpecs"]
    assert {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"} <= group.keys()
    nodes = [cluster["headGroupSpec"], *[group] * group["replicas"]]
    gpus = 0
    for node in nodes:
        spec = node["template"]["spec"]
        [container] = spec["containers"]
        assert {"name", "image", "resources"} <= container.keys()
        assert container["resources"]["limits"] == container["resources"]["requests"]
        gpus += int(container["resources"]["limits"]["nvidia.com/gpu"])
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in spec["volumes"]}
    words = job["spec"]["entrypoint"].split()
    assert words[:3] == ["quartet", "train", "/config/grpo.yaml"]
    options = dict(zip(words[3::2], words[4::2], strict=True))
    assert options.pop("--resume") == "auto"
    config = load(
        TrainConfig, HERE / "cluster.yaml", {name.removeprefix("--"): value for name, value in options.items()}
    )
    assert config.learner.workers + config.rollout.workers == gpus
    assert load(TrainConfig, HERE / "cluster.yaml", {"learner.workers": 8}).learner.parallel.shares(8) == (8, 1)


def test_the_image_is_made_of_what_the_package_is_with_extras_and_a_ray_that_exist():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    of_the_source = project["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    kept = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert kept == {*of_the_source, "rewards", "review", "pyproject.toml"}
    dockerfile = (HERE / "Dockerfile").read_text()
    [wanted] = re.findall(r"/src\[([\w,-]+)\]", dockerfile)
    assert set(wanted.split(",")) <= project["project"]["optional-dependencies"].keys()
    cluster = yaml.safe_load((HERE / "rayjob.yaml").read_text())["spec"]["rayClusterSpec"]
    assert f'"ray[default]=={cluster["rayVersion"]}"' in dockerfile

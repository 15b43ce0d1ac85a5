"""`quartet serve --backend vllm` with a real vLLM: it answers with the policy's tokens, and leaves nothing."""

import json
import signal
import subprocess
import sys
import urllib.error
import urllib.request

import psutil
import pytest
from vllm_cases import HEADS, gone, needs_vllm

from policies.policy import Policy
from rollout.engine import Engine
from rollout.group import Prompt
from rollout.sampling import SamplingParams

pytestmark = needs_vllm


def test_vllm_answers_with_the_policys_tokens_and_log_probabilities_and_leaves_nothing(random_policy, tmp_path):
    folder, key = tmp_path / "micro", tmp_path / "key"
    random_policy(3, **HEADS).save(folder)
    key.write_text("a-long-key")
    command = [sys.executable, "-m", "grpo", "serve", str(folder), "--backend", "vllm", "--port", "0"]
    command += ["--threads", "1", "--api_key_file", str(key)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            said = next(line for line in server.stdout if "http" in line)
            url = said[said.index("http") :].split()[0]
            children = psutil.Process(server.pid).children(recursive=True)
            asked = {"model": "micro", "prompt": "2 + 3 = ", "max_tokens": 12, "temperature": 0, "logprobs": 0}
            asked["return_token_ids"] = True
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(urllib.request.Request(f"{url}/models"))
            headers = {"Content-Type": "application/json", "Authorization": "Bearer a-long-key"}
            request = urllib.request.Request(f"{url}/completions", json.dumps(asked).encode(), headers)
            [choice] = json.load(urllib.request.urlopen(request, timeout=120))["choices"]
        finally:
            server.send_signal(signal.SIGTERM)
    policy = Policy.load(folder)
    prompt = Prompt("", "", policy.tokenizer.encode(asked["prompt"]))
    params = SamplingParams(1, 0.0, 12, tuple(policy.stop_token_ids), draft_tokens=0)
    own = Engine(policy).sample([prompt], params)[0].completions[0]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == (prompt.token_ids, own.token_ids)
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(own.logprobs, abs=1e-4)
    assert server.returncode == 143
    assert all(gone(child.pid) for child in children)

"""`quartet eval http://...`: the same scorer on what a server serves, and with ours on the same tokens."""

import http.server
import json

import pytest
from local_server import serving
from rich.console import Console
from serving_cases import Running

from grpo.cli.commands.eval import evaluate_model
from grpo.cli.commands.served import UNKNOWN, ServedPool
from grpo.cli.config.inference import EvalConfig, defaults_of_run
from grpo.cli.parse import main
from grpo.train import train
from rewards.config.options import load
from rollout.faults import RolloutError
from rollout.group import Prompt
from rollout.sampling import SamplingParams

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def trained(micro_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "run"
    train(
        micro_config(folder, **{"steps": 1, "data.template": "Q: {question}\nA: ", "data.few_shot": 1, "eval.limit": 5})
    )
    return folder


def test_an_evaluation_over_http_gives_the_tokens_and_scores_of_one_in_this_process(trained, tmp_path):
    options = defaults_of_run(trained) | {"eval.samples": 3, "stop": ["7"], "threads": 1}
    here = evaluate_model(load(EvalConfig, None, options | {"model": str(trained)}), QUIET)
    key = tmp_path / "key"
    key.write_text("key-of-the-test\n")
    server = Running(str(trained), api_key_file=key, **{"rollout.draft_tokens": 2})
    try:
        address = f"http://{server.address}"
        with pytest.raises(ValueError, match="does not answer as OpenAI's API does .*401"):
            evaluate_model(load(EvalConfig, None, options | {"model": address}), QUIET)
        config = load(EvalConfig, None, options | {"model": address, "api_key_file": key, "output": tmp_path / "out"})
        there = evaluate_model(config, QUIET)
        with pytest.raises(ValueError, match="data.chat_template_kwargs=.*thinking.*shows its chat template {};"):
            ServedPool(address, "key-of-the-test", 1, {"thinking": False})
    finally:
        server.end()
    for way in ("sampled", "greedy"):
        ids = [[c.token_ids for g in e.results[way].groups for c in g.completions] for e in (here, there)]
        assert ids[0] == ids[1]
        for name in ("prompts", "reward_mean", "correct", "length_mean", "clipped", "parts", "rewards_by_problem"):
            assert getattr(here.results[way], name) == getattr(there.results[way], name), name
    assert "served as 'run': the end of the run; policy version 1; what it was trained on" in there.source.meaning
    assert there.perplexity is None
    assert len((tmp_path / "out/completions.jsonl").read_text().splitlines()) == 5 * 4


class _Other(http.server.BaseHTTPRequestHandler):
    """A server of somebody else: it knows no prompt_id, and n is 1."""

    def _send(self, status: int, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self._send(200, {"object": "list", "data": [{"id": "theirs", "object": "model", "owned_by": "them"}]})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if unknown := set(asked) - {"model", "temperature", "max_tokens", "prompt", "seed"}:
            return self._send(400, {"error": {"message": f"what is {unknown}?"}})
        self.server.seeds.append(asked["seed"])
        if asked["prompt"].startswith("never"):
            return self._send(400, {"error": {"message": "that one I do not like"}})
        choice = {"index": 0, "text": f"{asked['seed']}", "finish_reason": "length"}
        return self._send(200, {"choices": [choice], "usage": {"completion_tokens": 4}})

    def log_message(self, *_):
        pass


def test_a_server_of_somebody_else_is_asked_for_one_completion_at_a_time():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Other)
    server.seeds = []
    with serving(server):
        pool = ServedPool(f"http://127.0.0.1:{server.server_port}/v1", "", 4)
        assert (pool.name, pool.is_ours) == ("theirs", False)
        prompts, ended = [Prompt("a", "2 + 2", []), Prompt("b", "never", []), Prompt("c", "3 + 3", [])], []
        with pytest.raises(RolloutError, match="prompt 'b': .*that one I do not like") as failed:
            pool.sample(prompts, SamplingParams(group_size=2, seed=1), ended.append)
        assert [group.prompt.prompt_id for group in failed.value.groups] == ["a", "c"]
        assert sum(ended) == 6
        completions = [c for group in failed.value.groups for c in group.completions]
        assert len({completion.text for completion in completions}) == 4  # each has a seed of its own
        assert all(c.token_ids == [UNKNOWN] * 4 and c.finish_reason == "length" for c in completions)
        again = pool.sample([prompts[0]], SamplingParams(group_size=2, seed=1))[0]
        assert [c.text for c in again.completions] == [c.text for c in completions[:2]]


class _Chat(_Other):
    """It answers with what its chat template was told."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        message = {"content": json.dumps(asked.get("chat_template_kwargs"))}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return self._send(200, {"choices": [choice], "usage": {"completion_tokens": 4}})


def test_variables_of_the_chat_template_reach_a_server_of_somebody_else():
    prompt = Prompt("a", "2 + 2", [], {}, [{"role": "user", "content": "2 + 2"}])
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Chat)
    with serving(server):
        for variables, said in (({"enable_thinking": False}, '{"enable_thinking": false}'), ({}, "null")):
            pool = ServedPool(f"http://127.0.0.1:{server.server_port}", "", 1, variables)
            [group] = pool.sample([prompt], SamplingParams(group_size=1))
            assert group.texts == [said]


def test_what_cannot_be_evaluated_is_said(capsys):
    for address, words, said in (
        ("http://127.0.0.1:1x", [], "does not answer as OpenAI's API does"),
        ("http://127.0.0.1:1", [], "does not answer as OpenAI's API does"),
        ("http://127.0.0.1:1", ["--rollout.lossy_margin", "2"], "rollout.lossy_margin: the server at"),
        ("http://127.0.0.1:1", ["--api_key_file", "nowhere"], "api_key_file=nowhere: there is no such file"),
    ):
        assert main(["eval", address, *words, "--eval.limit", "2"]) == 1
        assert said in capsys.readouterr().err

"""A teacher at a server: a fake one on loopback, whose log-probabilities are those of a policy that is also here."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import local_server
import pytest
import torch
from recorded import groups_of

from grpo.cli.parse import main
from grpo.learner.batch import collate
from grpo.learner.likelihood import Likelihood
from grpo.learner.row import PackedRow, Sample
from grpo.learner.terms import teacher_server
from grpo.learner.terms.distill import TeacherPolicy
from grpo.learner.terms.teacher_server import TeacherError, TeacherServer
from grpo.train import train
from policies.policy import Policy
from review.readers.run_folder import read_metrics
from rewards.config.options import dump_yaml


def answer_of(policy, body):
    """As vLLM writes it: nothing of the first token; of every other the k likeliest and its own."""
    ids, k = body["prompt"], body["prompt_logprobs"]
    with torch.no_grad():
        logprobs = policy.trunk(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    places = [None]
    for token, row in zip(ids[1:], logprobs, strict=False):
        chosen = {*row.topk(k).indices.tolist(), token} if k else {token}
        places.append({str(i): {"logprob": row[i].item(), "rank": 1, "decoded_token": "?"} for i in chosen})
    return {"choices": [{"text": "?", "prompt_logprobs": places}]}


@contextmanager
def serving(answer):
    """`answer` makes a body, or (status, text), of a request; `seen` has the requests."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                server.seen.append((self.path, dict(self.headers), body))
                said = answer(body)
            status, text = said if isinstance(said, tuple) else (200, json.dumps(said))
            self.send_response(status)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    lock = threading.Lock()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.seen, server.url = [], f"http://127.0.0.1:{server.server_port}/v1"
    with local_server.serving(server):
        yield server


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(teacher_server, "BACKOFF_S", 0.001)
    monkeypatch.setattr(teacher_server, "RETRIES", 1)


def batch(tools):
    groups, _ = groups_of(3)
    rows = [
        PackedRow(g.prompt.token_ids, [Sample(i, c.token_ids) for i, c in enumerate(g.completions)]) for g in groups
    ]
    if tools:  # the second token of one completion is a tool's
        ids = rows[1].samples[0].token_ids
        rows[1].samples[0] = Sample(0, ids, sampled=[i != 1 for i in range(len(ids))])
    return collate(rows, torch.device("cpu"))


@pytest.mark.parametrize("tools", [False, True])
def test_a_server_scores_as_the_policy_that_it_holds(random_policy, tools, monkeypatch):
    policy, mini = random_policy(2), batch(tools)
    likelihood = Likelihood(policy)
    here = TeacherPolicy(policy)
    monkeypatch.setenv("QUARTET_TEACHER_TOKEN", "secret")
    with serving(lambda body: answer_of(policy, body)) as server:
        there = TeacherServer(server.url + "/", "models/teacher")
        assert torch.allclose(there.logprobs(likelihood, mini), here.logprobs(likelihood, mini), atol=1e-4)
        path, headers, body = server.seen[0]
        assert (path, headers["Authorization"]) == ("/v1/completions", "Bearer secret")
        assert (body["model"], body["max_tokens"], body["prompt_logprobs"]) == ("models/teacher", 1, 0)
        asked = [body["prompt"] for *_, body in server.seen]
        assert sorted(asked) == sorted(r.prompt_token_ids + s.token_ids for r in mini.rows for s in r.samples)
        ids, logprobs = there.top(likelihood, mini, 4)
    expected_ids, expected = here.top(likelihood, mini, 4)
    assert ids.tolist() == expected_ids.tolist()
    assert len(ids) == mini.scored.sum()
    assert torch.allclose(logprobs, expected, atol=1e-4)


def places(ids, **changed):
    return [None, *(changed.get(f"at_{i}", {str(token): {"logprob": -1.0}}) for i, token in enumerate(ids[1:], 1))]


def of(found):
    return {"choices": [{"text": "?", "prompt_logprobs": found}]}


IDS = [5, 6, 7]
WRONG = [
    ({"choices": [{"text": "?"}]}, "an answer without prompt_logprobs"),
    (of(None), "an answer without prompt_logprobs"),
    ((200, "no JSON"), "an answer without prompt_logprobs"),
    ((400, "prompt_logprobs > 20"), "HTTP 400 .*prompt_logprobs > 20"),
    (of(places([1, 2, 3, 4])), "it has read 4 tokens, and 3 were given"),
    (of(places(IDS, at_2={"9": {"logprob": -1.0}})), r"it scores the tokens \[9\] where 7 and the 0 likeliest"),
    (of(places(IDS, at_2={"7": {"logprob": "nan"}})), "a log-probability of token 7 that is not finite"),
]


@pytest.mark.parametrize(("answer", "said"), WRONG)
def test_an_answer_that_scores_nothing_is_an_error_with_the_way_out(answer, said, monkeypatch):
    monkeypatch.setenv("QUARTET_TEACHER_TOKEN", "secret")
    with serving(lambda _: answer) as server, pytest.raises(TeacherError, match=rf"^distill.*: .*{said}") as error:
        TeacherServer(server.url, "t").score([IDS], [1], 0)
    assert "`vllm serve t`" in str(error.value)
    assert "secret" not in str(error.value)


def test_fewer_tokens_than_were_asked_for_are_an_error():
    with serving(lambda _: of(places(IDS))) as server, pytest.raises(TeacherError, match="--max-logprobs 30"):
        TeacherServer(server.url, "t").score([IDS], [1], 30)


def test_the_place_of_every_value_by_hand():
    answer = of([None, {"6": {"logprob": -0.25}}, {"7": {"logprob": -1.5}}])
    with serving(lambda _: answer) as server:
        assert TeacherServer(server.url, "t").score([IDS, IDS], [1, 2], 0) == [[{6: -0.25}, {7: -1.5}], [{7: -1.5}]]


def at(folders, url):
    return {"distill.teacher": f"{folders / 'teacher'}@{url}"}


def options_of(folders, **given):
    options = {"model": str(folders / "student"), "loss.advantage": "distill", "sft.steps": 0}
    options |= {"rollout.draft_tokens": 0, "distill.teacher": str(folders / "teacher"), "rollout.temperature": 1.0}
    return options | given


@pytest.mark.parametrize("top_k", [None, pytest.param(3, marks=pytest.mark.slow)])
def test_a_run_with_a_server_learns_what_a_run_with_the_folder_learns(folders, micro_config, tmp_path, top_k):
    policy, given = Policy.load(folders / "teacher"), {"steps": 2, "distill.top_k": top_k}
    train(micro_config(tmp_path / "here", **options_of(folders, **given)))
    with serving(lambda body: answer_of(policy, body)) as server:
        train(micro_config(tmp_path / "there", **options_of(folders, **given | at(folders, server.url))))
    kl = {name: [line.get("loss/teacher_kl") for line in read_metrics(tmp_path / name)] for name in ("here", "there")}
    assert len([value for value in kl["here"] if value]) == 2
    assert kl["there"] == pytest.approx(kl["here"], abs=1e-3)


def test_a_dead_server_and_a_missing_key_are_found_before_a_model_is_loaded(
    folders, micro_config, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("grpo.source.policy_source.load_found", lambda *_, **__: pytest.fail("a policy was loaded"))

    def config(**given):
        return micro_config(tmp_path / "run", **options_of(folders, **given))

    dead = at(folders, "http://127.0.0.1:9/v1")
    with pytest.raises(TeacherError, match="distill.teacher: http://127.0.0.1:9/v1/completions gave no usable answer"):
        train(config(**dead))
    file = tmp_path / "run.yaml"
    file.write_text(dump_yaml(config(**dead)))
    assert main(["train", str(file)]) == 1
    assert capsys.readouterr().err.startswith("quartet: distill.teacher: ")
    assert not (tmp_path / "run").exists()

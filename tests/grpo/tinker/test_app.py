"""Tinker's SDK against a server in a thread of this process, and what is no request of the SDK."""

import json
import random
import socket
import threading
import urllib.error
import urllib.request

import pytest
import tinker
import torch
import uvicorn
from tinker import types
from tinker.proto import tinker_public_pb2 as messages

from grpo.endpoint import door as of_door
from grpo.endpoint.connections import settings
from grpo.tinker import sampler as of_sampler
from grpo.tinker.app import app
from grpo.tinker.service import Service
from rewards.listening import listen

TOKENS = [5, 9, 12, 7, 3, 8]
SESSION = {"tags": [], "user_metadata": None, "sdk_version": "1", "type": "create_session"}


class Running:
    def __init__(self, base, folder, keys=()):
        self.service = Service(base, "llama", folder, torch.float32)
        self.socket, self.address = listen("127.0.0.1", 0)
        application = app(self.service, keys)
        self.door = application.state.door
        self.server = uvicorn.Server(settings(application, lifespan="on"))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})
        self.thread.start()

    def ask(self, path, body=None, headers=None, method=None):
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        headers = {"Content-Type": "application/json"} | (headers or {})
        request = urllib.request.Request(f"http://{self.address}/api/v1/{path}", data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, json.loads(response.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def close(self):
        self.server.should_exit = True
        self.thread.join()
        self.socket.close()


@pytest.fixture(scope="module")
def server(base, tmp_path_factory):
    running = Running(base, tmp_path_factory.mktemp("state"))
    yield running
    running.close()


@pytest.fixture
def client(server):
    client = tinker.ServiceClient(base_url=f"http://{server.address}", api_key="tml-any")
    yield client
    client.close("success").result()


def datum(tokens=TOKENS):
    inputs = {"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)}
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


def test_the_sdk_trains_samples_saves_and_goes_on(server, client):
    training = client.create_lora_training_client(base_model="llama", rank=4).result()
    assert training.get_info().lora_rank == 4
    losses = []
    for _ in range(3):
        forward = training.forward_backward([datum(), datum(TOKENS[::-1])], "cross_entropy")
        step = training.optim_step(types.AdamParams(learning_rate=2e-2))
        losses.append(forward.result().metrics["loss:sum"])
        assert step.result().metrics["grad_norm"] > 0
    assert losses == sorted(losses, reverse=True)
    sampling = training.save_weights_and_get_sampling_client().result()
    found = sampling.sample(types.ModelInput.from_ints(TOKENS[:2]), 3, types.SamplingParams(max_tokens=4)).result()
    assert [len(sequence.tokens) for sequence in found.sequences] == [4, 4, 4]
    assert len({sequence.sequence_id for sequence in found.sequences}) == 3
    [first, *_] = found.sequences
    scored = sampling.compute_logprobs(types.ModelInput.from_ints([*TOKENS[:2], *first.tokens])).result()
    assert first.logprobs == pytest.approx(scored[2:], abs=2e-5)
    prompt = types.ModelInput.from_ints(TOKENS)
    logprobs = sampling.compute_logprobs(prompt).result()
    forward = training.forward([datum()], "cross_entropy").result().loss_fn_outputs[0]["logprobs"]
    assert logprobs[0] is None
    assert logprobs[1:] == pytest.approx(forward.data, abs=2e-5)
    assert sampling.compute_logprobs(prompt, prompt_logprobs_last_n=2).result()[:4] == [None] * 4
    path = training.save_state("here").result().path
    other = client.create_training_client_from_state_with_optimizer(path).result()
    assert other.forward([datum()], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].data == pytest.approx(
        forward.data, abs=0
    )
    named = training.save_weights_for_sampler("named").result().path
    assert client.create_sampling_client(model_path=named).result().get_base_model() == "llama"
    rest = tinker.RestClient(base_url=f"http://{server.address}", api_key="tml-any")
    checkpoints = rest.list_checkpoints(training.model_id).result().checkpoints
    assert {checkpoint.checkpoint_id for checkpoint in checkpoints} == {"weights/here", "sampler_weights/named"}
    assert rest.get_weights_info_by_tinker_path(path).result().lora_rank == 4
    assert rest.get_server_capabilities().result().supported_models[0].model_name == "llama"
    assert training.model_id in {run.training_run_id for run in rest.list_training_runs().result().training_runs}
    rest.delete_checkpoint_from_tinker_path(path).result()


def test_a_loss_of_the_clients_own_has_its_gradient(client):
    """`forward_backward_custom` of a loss that the server has too ends in the same step."""
    sampled = {"logprobs": [-2.0] * 5, "advantages": [1.0, -1.0, 0.5, 0.0, 2.0]}

    def ppo(data, logprobs):
        ratio = (logprobs[0] + 2.0).exp()
        advantages = torch.tensor(sampled["advantages"])
        return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).sum(), {}

    inputs = {"target_tokens": TOKENS[1:]} | sampled
    of_policy = types.Datum(model_input=types.ModelInput.from_ints(TOKENS[:-1]), loss_fn_inputs=inputs)
    found = []
    for own in (True, False):
        training = client.create_lora_training_client(base_model="llama", rank=4, seed=7).result()
        if own:
            training.forward_backward_custom([of_policy], ppo).result()
        else:
            training.forward_backward([of_policy], "ppo").result()
        training.optim_step(types.AdamParams(learning_rate=1e-2)).result()
        found.append(training.forward([datum()], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].data)
    assert list(found[0]) == pytest.approx(list(found[1]), abs=1e-4)


def test_errors_come_in_the_form_of_the_sdk_and_the_model_goes_on(client):
    training = client.create_lora_training_client(base_model="llama", rank=4).result()
    with pytest.raises(tinker.RequestFailedError, match="its formula is not published") as refusal:
        training.forward_backward([datum()], "stable_reinforce").result()
    assert refusal.value.category == types.RequestErrorCategory.User
    training.forward([datum()], "cross_entropy").result()  # and it goes on
    with pytest.raises(tinker.RequestFailedError, match="this server has 'llama'"):
        client.create_lora_training_client(base_model="none", rank=4).result()
    with pytest.raises(tinker.NotFoundError, match="nothing of this id here"):
        client.create_sampling_client(model_path="tinker://a/weights/b").result()
    with pytest.raises(tinker.APIStatusError, match="no such part of the API"):
        tinker.RestClient(base_url=client._base_url, api_key="tml-any").publish_checkpoint_from_tinker_path(
            "tinker://a/weights/b"
        ).result()
    inputs = {"model_input": types.ModelInput.from_ints(TOKENS[:-1]), "loss_fn_inputs": {"target_tokens": TOKENS[1:]}}
    picture = types.ModelInput(chunks=[types.ImageChunk(data=b"", format="png")])
    sparse = types.TensorData.from_torch_sparse(torch.eye(5))
    with_sparse = inputs | {"loss_fn_inputs": {"target_tokens": sparse}}
    for datums, loss, config, words in (
        (with_sparse, "cross_entropy", {}, "a sparse tensor"),
        (inputs | {"model_input": picture}, "cross_entropy", {}, "pictures or sound"),
        (inputs, "dro", {"beta": float("nan")}, r"loss_fn_config\['beta'\]=nan"),
    ):
        with pytest.raises(tinker.RequestFailedError, match=words) as refusal:
            training.forward_backward([types.Datum(**datums)], loss, config or None).result()
        assert refusal.value.category == types.RequestErrorCategory.User
        training.forward([datum()], "cross_entropy").result(timeout=20)


def test_a_key_is_the_owner_of_what_was_made_with_it(base, tmp_path):
    """Another key reads, changes and deletes nothing: for it the ids and paths are not there. Also after a restart."""
    keys = ["tml-one-of-us", "tml-another"]
    running = Running(base, tmp_path / "state", keys)
    one, other = ({"X-API-Key": key} for key in keys)
    try:
        with pytest.raises(tinker.AuthenticationError, match="send X-API-Key: KEY"):
            tinker.ServiceClient(base_url=f"http://{running.address}", api_key="tml-wrong").create_sampling_client(
                base_model="llama"
            ).result()
        client = tinker.ServiceClient(base_url=f"http://{running.address}", api_key=keys[0])
        training = client.create_lora_training_client(base_model="llama", rank=4).result()
        model, path = training.model_id, training.save_state("here").result().path
        session = model.partition(":")[0]
        sampler = training.save_weights_and_get_sampling_client().result()._sampling_session_id
        client.close("success").result()
    finally:
        running.close()
    running = Running(base, tmp_path / "state", keys)
    try:
        [mine] = running.ask("create_session", SESSION, other)[1].values()
        prompt = {"chunks": [{"type": "encoded_text", "tokens": TOKENS}]}
        asked = {"sampling_session_id": sampler, "seq_id": 9, "prompt": prompt, "sampling_params": {"max_tokens": 1}}
        sampling = {"session_id": mine, "sampling_session_seq_id": 0, "model_path": path}
        adam = {"learning_rate": 1e-3}
        message = messages.ForwardBackwardRequest(model_id=model, seq_id=12, loss_fn="cross_entropy")
        protobuf = {"Content-Type": "application/x-protobuf"}
        attempts = [
            ("POST", "session_heartbeat", {"session_id": session, "type": "session_heartbeat"}, {}),
            ("POST", f"sessions/{session}/finish", {}, {}),
            ("POST", "create_model", {"session_id": session, "model_seq_id": 5, "base_model": "llama"}, {}),
            ("POST", "get_info", {"model_id": model}, {}),
            ("POST", "optim_step", {"model_id": model, "seq_id": 9, "adam_params": adam}, {}),
            ("POST", "save_weights", {"model_id": model, "seq_id": 10, "path": "there"}, {}),
            ("POST", "save_weights_for_sampler", {"model_id": model, "seq_id": 11, "path": "there"}, {}),
            ("POST", "load_weights", {"model_id": model, "seq_id": 9, "path": "none", "optimizer": False}, {}),
            ("POST", "load_weights", {"session_id": mine, "model_seq_id": 0, "path": path, "optimizer": False}, {}),
            ("POST", "forward_backward", message.SerializeToString(), protobuf),
            ("POST", "create_sampling_session", sampling, {}),
            ("POST", "asample", asked, {}),
            ("POST", "retrieve_future", {"request_id": f"{model}:0"}, {}),
            ("POST", "weights_info", {"tinker_path": path}, {}),
            ("GET", f"samplers/{sampler}", None, {}),
            ("GET", f"training_runs/{model}", None, {}),
            ("GET", f"training_runs/{model}/checkpoints", None, {}),
            ("DELETE", f"training_runs/{model}/checkpoints/weights/here", None, {}),
        ]
        for method, route, body, more in attempts:
            status, said = running.ask(route, body, other | more, method)
            assert (status, "nothing of this id" in said["detail"]) == (404, True), (route, said)
        assert running.ask("training_runs", headers=other)[1]["training_runs"] == []
        wrong = {"model_id": model, "seq_id": running.service.model(model).next, "path": 1}
        assert running.ask("save_weights", wrong, other)[0] == 400
        assert running.service.model(model).next == wrong["seq_id"]  # another key takes no number
        assert [run["training_run_id"] for run in running.ask("training_runs", headers=one)[1]["training_runs"]] == [
            model
        ]
        for method, route, body, more in attempts:  # each is right but for the key
            if mine not in str(body) and route != "load_weights":
                status, said = running.ask(route, body, one | more, method)
                assert status == 200, (route, said)
        for file in (tmp_path / "state/sessions").iterdir():
            assert not any(key in file.read_text() for key in keys)
    finally:
        running.close()


def test_without_a_key_all_clients_of_this_machine_are_one(server):
    made = server.ask("create_session", SESSION, {"X-API-Key": "tml-one"})[1]["session_id"]
    heartbeat = {"session_id": made, "type": "session_heartbeat"}
    assert server.ask("session_heartbeat", heartbeat, {"X-API-Key": "tml-another"})[0] == 200


def sampled_by(server, changes=None, params=None):
    """A sample of the base's weights, asked for without the SDK: the status and the answer."""
    session = server.service.create_session({})
    request = {"sampling_session_id": server.service.add_sampler(session, 0, None), "seq_id": 0}
    request["prompt"] = {"chunks": [{"type": "encoded_text", "tokens": TOKENS}]}
    request["sampling_params"] = {"max_tokens": 2} | (params or {})
    return server.ask("asample", request | (changes or {}))


def test_a_sample_out_of_bounds_is_a_bad_request_before_anything_is_kept(server):
    before = len(server.service.jobs)
    for changes, params, words in (
        ({"num_samples": 10**9}, {}, "num_samples=1000000000: use 1 to 1024"),
        ({}, {"max_tokens": 0}, "max_tokens=0: use 1 or more"),
        ({"seq_id": 10**300}, {}, "seq_id=1000"),
        (
            {"prompt": {"chunks": [{"type": "encoded_text", "tokens": [5] * 65}]}},
            {},
            "it has 65 tokens, and the context",
        ),
        ({}, {"stop": ["a"] * 17}, "at most 16 texts"),
        ({}, {"stop": ["a" * 1001]}, "of at most 1,000 characters"),
    ):
        status, said = sampled_by(server, changes, params)
        assert status == 400
        assert words in said["detail"]
        assert len(server.service.jobs) == before
    noted = SESSION | {"user_metadata": {"note": "x" * (1 << 16)}}
    status, said = server.ask("create_session", noted)
    assert (status, said["detail"]) == (413, "the body has more than 65,536 bytes; shorten it")
    assert sampled_by(server)[0] == 200  # and it goes on


@pytest.mark.parametrize("kind", ["sample", "forward_backward"])
def test_health_is_answered_and_the_body_is_bounded_until_a_request_is_kept(server, monkeypatch, kind):
    """Parsing and writing take a while, here until a large body has been seen to count."""
    begun, goes_on, door, found = threading.Event(), threading.Event(), server.door, []
    monkeypatch.setattr(of_door, "LARGE", 100)
    name = "ask_sampler" if kind == "sample" else "ask"
    ask = getattr(server.service, name)

    def slowly(*of):
        begun.set()
        assert goes_on.wait(20)
        return ask(*of)

    model = f"{server.service.create_session({})}:train:0"
    server.service.ask(model, 0, "create_model", b'{"base_model": "llama"}')
    message = messages.ForwardBackwardRequest(model_id=model, seq_id=1, loss_fn="a" * 200)
    body, protobuf = message.SerializeToString(), {"Content-Type": "application/x-protobuf"}

    def send():
        of_sample = kind == "sample"
        found.append(sampled_by(server) if of_sample else server.ask("forward_backward", body, protobuf))

    monkeypatch.setattr(server.service, name, slowly)
    asking = threading.Thread(target=send)
    asking.start()
    try:
        assert begun.wait(20)
        assert server.ask("healthz") == (200, {"status": "ok"})
        assert door.held > 100
    finally:
        goes_on.set()
        asking.join()
    assert [status for status, _ in found] == [200]
    assert door.held == 0


def test_a_sample_is_read_next_to_other_requests(server, monkeypatch):
    """Not on the thread that answers: a prompt of 4 MB takes most of a second there."""
    threads, read = [], of_sampler.read
    monkeypatch.setattr(of_sampler, "read", lambda *of: threads.append(threading.current_thread()) or read(*of))
    assert sampled_by(server)[0] == 200
    assert server.thread not in threads


def test_health_is_503_where_a_thread_has_ended(server, monkeypatch):
    ended = {"status": "a computing thread has ended"}
    monkeypatch.setattr(server.service, "state", lambda: ended)
    assert server.ask("healthz") == (503, ended)


def test_numbers_that_are_not_finite_are_bad_requests(server, client):
    """Of every place that reads one; JSON has no such number, and Python's own reader takes it."""
    training = client.create_lora_training_client(base_model="llama", rank=2).result()
    session = training.model_id.partition(":")[0]
    sampling = server.service.add_sampler(session, 77, None)
    prompt = f'"prompt": {{"chunks": [{{"type": "encoded_text", "tokens": {TOKENS}}}]}}'
    sampled = f'"sampling_session_id": "{sampling}", "seq_id": 0, {prompt}'
    bodies = {
        "asample": f'{{{sampled}, "sampling_params": {{"temperature": N}}}}',
        "optim_step": f'{{"model_id": "{training.model_id}", "seq_id": 1, "adam_params": {{"learning_rate": N}}}}',
        "create_session": '{"tags": [], "user_metadata": {"rate": [1, N]}, "sdk_version": "1"}',
    }
    for number in ("NaN", "Infinity", "-Infinity", "1e999", '"nan"'):
        for path, body in bodies.items():
            if (path, number) == ("create_session", '"nan"'):
                continue  # there it is a text
            status, said = server.ask(path, body.replace("N}", number + "}").replace("N]", number + "]").encode())
            assert status == 400, said
            assert "use a finite number" in said["detail"]
            assert any(name in said["detail"] for name in ("sampling_params.temperature=", "learning_rate=", "rate.1="))


def test_a_request_that_is_refused_at_once_keeps_no_later_one_waiting(server, client):
    """The SDK numbers a request before it sends it, and goes on with the next number."""
    training = client.create_lora_training_client(base_model="llama", rank=2).result()
    with pytest.raises(tinker.BadRequestError, match="learning_rate=None"):
        training.optim_step(types.AdamParams(learning_rate=float("nan"))).result()
    assert training.forward_backward([datum()], "cross_entropy").result(timeout=20).metrics["loss:sum"] > 0
    assert training.optim_step(types.AdamParams(learning_rate=1e-3)).result(timeout=20).metrics["grad_norm"] > 0
    body = {"model_id": training.model_id, "seq_id": 4, "path": 1}
    assert server.ask("save_weights", body)[0] == 400
    assert server.ask("retrieve_future", {"request_id": f"{training.model_id}:4"}) == (
        200,
        {"error": "path=1: Input should be a valid string", "category": "user"},
    )
    for wrong in ({"model_id": "a:train:0"}, {"seq_id": 0}, {"seq_id": 10**8}, {"seq_id": None}):
        assert server.ask("save_weights", body | {"seq_id": 5} | wrong)[0] == 400
    assert server.service.model(training.model_id).next == 5


def test_hostile_requests_get_an_error_in_form_and_the_server_goes_on(server, client):
    """Malformed, huge, half-sent: by a seed, over every path."""
    draw = random.Random(200)
    training = client.create_lora_training_client(base_model="llama", rank=2).result()
    want = training.forward([datum()], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].data
    paths = [route.path.removeprefix("/api/v1/") for route in app(server.service).routes]
    values = [None, -1, 2**70, 0.5, "", "x" * 5000, "../../etc/passwd", [], {}, [[]], True, "\udc80", training.model_id]
    keys = ["model_id", "session_id", "seq_id", "model_seq_id", "base_model", "path", "request_id", "prompt", "type"]
    keys += ["sampling_params", "sampling_session_id", "lora_config", "adam_params", "optimizer", "num_samples", "tags"]
    statuses = set()
    for _ in range(250):
        path = draw.choice([*paths, "nothing", "sessions/%2e%2e/finish"])
        path = path.replace("{session}", "..").replace("{run}", "%2e%2e").replace("{place:path}", "../../x")
        path = path.replace("{sampler}", draw.choice(["..", training.model_id]))
        kind = draw.randrange(5)
        if kind == 0:
            body = draw.randbytes(draw.randrange(2000))
        elif kind == 1:
            body = b"{" * draw.randrange(1, 20000)
        elif kind == 2:
            half = socket.create_connection(server.socket.getsockname())
            half.sendall(f"POST /api/v1/{path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\nhalf".encode())
            half.close()
            continue
        else:
            body = {draw.choice(keys): draw.choice(values) for _ in range(draw.randrange(8))}
        status, said = server.ask(path, body, method=draw.choice(["POST", "POST", "POST", "GET", "DELETE"]))
        statuses.add(status)
        assert status < 500, (path, body, said)
        assert status < 400 or isinstance(said["detail"], str)
    assert {400, 404} <= statuses
    assert training.forward([datum()], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].data == pytest.approx(
        want, abs=0
    )

"""Requests and their results: their order, what is asked twice, other clients, and a service that goes on."""

import json
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tinker.proto import tinker_public_pb2 as messages

from grpo.endpoint.api_error import ApiError
from grpo.run.lock import FolderInUse
from grpo.tinker import sampler as of_sampler
from grpo.tinker import service as of_service
from grpo.tinker.service import Service, Unknown
from grpo.tinker.wire import Refused

TOKENS = [5, 9, 12, 7, 3, 8]


class Client:
    """Numbers its requests as the SDK does, and sends them in any order."""

    def __init__(self, service: Service, rank=4, seed=None, owner=""):
        self.service = service
        self.session = service.create_session({"owner": owner})
        self.model = f"{self.session}:train:0"
        self.number = 0
        self.ask("create_model", base_model="llama", lora_config={"rank": rank} | ({"seed": seed} if seed else {}))

    def ask(self, kind, **request):
        job = self.service.ask(self.model, self.number, kind, json.dumps(request).encode())
        self.number += 1
        return job

    def learn(self, tokens=TOKENS, number=None, rate=1e-2):
        """A supervised step, of which both requests are under way."""
        body = supervised(self.model, self.number, tokens)
        first = self.service.ask(self.model, self.number, "forward_backward", body)
        self.number += 1
        return first, self.ask("optim_step", adam_params=adam(rate))

    def gradient(self):
        body = supervised(self.model, self.number, TOKENS)
        self.number += 1
        return self.service.ask(self.model, self.number - 1, "forward_backward", body)

    def sampler(self):
        job = self.ask("save_weights_for_sampler", sampling_session_seq_id=self.number)
        return answer(job)["sampling_session_id"]


def adam(rate):
    return {"learning_rate": rate, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.0, "grad_clip_norm": 0.0}


def supervised(model, number, tokens):
    message = messages.ForwardBackwardRequest(model_id=model, seq_id=number, loss_fn="cross_entropy")
    datum = message.data.add()
    datum.model_input.add().encoded_text.tokens = np.array(tokens[:-1], dtype=np.int32).tobytes()
    targets = np.array(tokens[1:], dtype=np.int64)
    datum.loss_fn_inputs["target_tokens"].CopyFrom(
        messages.Tensor(dtype=messages.DTYPE_INT64, dense=targets.tobytes(), shape=[len(targets)])
    )
    return message.SerializeToString()


def sample(service, sampler, number=0, **changes):
    request = {"prompt": {"chunks": [{"type": "encoded_text", "tokens": TOKENS[:3]}]}, "num_samples": 2}
    request |= {"sampling_params": {"max_tokens": 8} | changes.pop("sampling_params", {})} | changes
    return service.ask_sampler(sampler, number, json.dumps(request).encode())


def result(job):
    assert job.done.wait(60)
    return job.read()


def answer(job):
    form, content = result(job)
    assert form == "json"
    said = json.loads(content)
    assert "error" not in said, said
    return said


def error(job):
    return json.loads(result(job)[1])["error"]


def samples(job):
    form, content = result(job)
    assert form == "pb", content
    message = messages.SampleResponse.FromString(content)
    tokens = [np.frombuffer(s.tokens, np.int32).tolist() for s in message.sequences]
    return tokens, [np.frombuffer(s.logprobs, np.float32).tolist() for s in message.sequences], message


def test_requests_take_effect_in_the_order_of_their_numbers(service):
    client, turned = Client(service), Client(service)
    want = [result(job) for _ in range(2) for job in client.learn()]
    bodies = []
    for number in (1, 3):
        bodies.append((number, "forward_backward", supervised(turned.model, number, TOKENS)))
        bodies.append((number + 1, "optim_step", json.dumps({"adam_params": adam(1e-2)}).encode()))
    jobs = {number: service.ask(turned.model, number, kind, body) for number, kind, body in reversed(bodies)}
    assert [result(jobs[number]) for number in sorted(jobs)] == want
    assert want[0] != want[2]  # the second loss is another one: it has learned


def test_a_request_that_is_sent_again_is_the_same_one(service):
    client = Client(service)
    first, _ = client.learn()
    again = service.ask(client.model, 1, "forward_backward", supervised(client.model, 1, TOKENS))
    assert again is first
    known = sample(service, client.sampler())
    assert sample(service, known.owner.id) is known


def test_another_request_under_a_number_that_is_taken_is_refused(service):
    """Two clients of one session: the second one got the first one's result, and its own request was lost."""
    client = Client(service)
    [result(job) for job in client.learn()]
    step = json.dumps({"adam_params": adam(1e-2)}).encode()
    assert service.ask(client.model, 2, "optim_step", step).number == 2
    others = [("optim_step", json.dumps({"adam_params": adam(5.0)}).encode()), ("save_weights", b"{}")]
    for kind, body in [*others, ("forward_backward", supervised(client.model, 2, TOKENS))]:
        with pytest.raises(Refused, match=r"request 2 of .* was another optim_step; number each request once"):
            service.ask(client.model, 2, kind, body)
    sampler = service.add_sampler(client.session, 0, None)
    first = sample(service, sampler, 0)
    assert sample(service, sampler, 0) is first
    with pytest.raises(Refused, match="request 0 of .* was another sample"):
        sample(service, sampler, 0, num_samples=3)


def test_a_sampler_has_the_weights_of_its_time_and_the_base_has_none(service):
    client = Client(service)
    base = service.add_sampler(client.session, 99, None)
    before = client.sampler()
    want = samples(sample(service, before))
    for _ in range(5):
        client.learn(rate=0.1)
    after = client.sampler()
    assert samples(sample(service, before, 0))[:2] == want[:2]
    seeded = {"sampling_params": {"seed": 3}}
    of_base = samples(sample(service, base, **seeded))[1]
    assert samples(sample(service, after, **seeded))[1] != of_base
    assert samples(sample(service, before, 1, **seeded))[1] == of_base


@pytest.mark.slow
def test_clients_do_not_see_each_others_weights(base, tmp_path):
    """Three at once, in turns, get what each gets alone."""

    def run(name, together):
        service = Service(base, "llama", tmp_path / name, torch.float32)
        try:
            clients = [Client(service, seed=seed) for seed in (1, 2, 3)]
            data = [TOKENS, TOKENS[::-1], [3, 3, 4, 5, 6]]
            jobs = [[], [], []]
            order = [0, 1, 2] * 3 if together else [0] * 3 + [1] * 3 + [2] * 3
            for who in order:
                jobs[who] += clients[who].learn(data[who])
            asked = [sample(service, client.sampler()) for client in clients]
            return [[result(job) for job in of] for of in jobs], [samples(job)[:2] for job in asked]
        finally:
            service.close()

    assert run("together", True) == run("apart", False)


@pytest.mark.parametrize("keep_state_s", [0.0, pytest.param(1e9, marks=pytest.mark.slow)])
def test_a_service_that_was_killed_goes_on_to_the_same_bits(base, tmp_path, monkeypatch, keep_state_s):
    """By the state that was kept last, or by doing everything again."""
    monkeypatch.setattr(of_service, "KEEP_STATE_S", keep_state_s)

    def begin(name):
        return Service(base, "llama", tmp_path / name, torch.float32)

    whole = begin("whole")
    client = Client(whole)
    want = [result(job) for _ in range(4) for job in client.learn()]
    sampled = samples(sample(whole, client.sampler()))[:2]
    whole.close()

    first = begin("killed")
    client = Client(first)
    [result(job) for _ in range(2) for job in client.learn()]
    client.service._closed = True  # what is asked from now on is acknowledged, and not done
    client.service._training.put(None)
    client.service._threads[0].join()
    client.learn()
    first.lock.release()
    second = begin("killed")
    client.service = second
    found = [result(second.job(f"{client.model}:{number}")) for number in range(1, 7)]
    found += [result(job) for job in client.learn()]
    assert found == want
    assert samples(sample(second, client.sampler()))[:2] == sampled
    second.close()


def test_weights_that_a_later_save_has_removed_end_no_model_that_is_computed_again(base, tmp_path, monkeypatch):
    """A loop that samples at each step saves more of them than are kept, within the time between two states."""
    monkeypatch.setattr(of_service, "UNNAMED", 2)
    first = Service(base, "llama", tmp_path / "state", torch.float32)
    client = Client(first)
    for _ in range(4):
        [answer(job) if job.kind == "optim_step" else result(job) for job in client.learn()]
        sampler = client.sampler()
    want = samples(sample(first, sampler))[:2]
    first.close()
    client.service = Service(base, "llama", tmp_path / "state", torch.float32)
    try:
        assert answer(client.learn()[1])["type"] == "optim_step"
        assert samples(sample(client.service, sampler, 1, sampling_params={"seed": 3}))[0]
        assert samples(client.service.job(f"{sampler}:0"))[:2] == want
    finally:
        client.service.close()


def test_a_service_that_ended_while_samples_waited_goes_on_with_them(base, tmp_path):
    first = Service(base, "llama", tmp_path / "state", torch.float32)
    sampler = first.add_sampler(first.create_session({}), 0, None)
    want = samples(sample(first, sampler))[:2]
    first.close()
    waiting = [sample(first, sampler, number).request_id for number in (1, 2)]  # acknowledged, and not done
    second = Service(base, "llama", tmp_path / "state", torch.float32)
    try:
        assert samples(second.job(f"{sampler}:0"))[:2] == want
        assert [len(samples(second.job(request_id))[0]) for request_id in waiting] == [2, 2]
    finally:
        second.close()


def test_a_model_that_is_made_again_leaves_what_is_being_written(service):
    """The result of another request may be half written in the folder just then."""
    client = Client(service)
    answer(service.job(f"{client.model}:0"))
    partial = service.model(client.model).files.results / ".00000001.json.partial"
    partial.write_bytes(b"half")
    client.number = 0
    answer(client.ask("create_model", base_model="llama", lora_config={"rank": 4}))
    assert partial.read_bytes() == b"half"


def test_requests_that_wait_have_a_bound_and_the_missing_one_is_taken(service, monkeypatch):
    client = Client(service)
    answer(service.job(f"{client.model}:0"))
    body = json.dumps({"adam_params": adam(1e-2)}).encode()
    jobs = [service.ask(client.model, number, "optim_step", body) for number in (2, 3, 4)]
    for name, most, words in (
        ("MOST_OF_ONE", 3, f"4 requests of {client.model} would wait, and at most 3 may"),
        ("MOST_WAITING", 3, "4 requests would wait"),
        ("MOST_BYTES", 3 * len(body), f"{4 * len(body)} bytes of requests would wait"),
    ):
        with monkeypatch.context() as bound:
            bound.setattr(of_service, name, most)
            with pytest.raises(ApiError, match=f"{words}.*; request 1 of the model has not come") as refused:
                service.ask(client.model, 5, "optim_step", body)
        assert (refused.value.status, refused.value.headers) == (429, {"Retry-After": "1"})
    monkeypatch.setattr(of_service, "MOST_BYTES", 3 * len(body))
    other = Client.__new__(Client)
    with pytest.raises(ApiError, match="wait for results"):
        other.__init__(service)
    monkeypatch.setattr(of_service, "MOST_WAITING", 3)
    for key in ("one", "another"):  # who waits for nothing is not kept waiting by others
        answer(service.job(f"{Client(service, owner=key).model}:0"))
    monkeypatch.undo()
    jobs.append(service.ask(client.model, 1, "forward_backward", supervised(client.model, 1, TOKENS)))
    assert ["error" in json.loads(result(job)[1]) for job in jobs[:1]] == [False]
    assert [result(job)[0] for job in jobs] == ["json", "json", "json", "pb"]
    client.number = 5
    answer(client.ask("optim_step", adam_params=adam(1e-2)))


def test_a_sample_that_waits_is_done_however_many_later_ones_came_before_it(service, monkeypatch):
    monkeypatch.setattr(of_service, "RESULTS", 3)
    sampler = service.add_sampler(service.create_session({}), 0, None)
    numbers = [10, 11, 12, 13, 14, 15, 4, 1]
    with service._mutex:  # nothing is done before all are here
        jobs = [sample(service, sampler, number, sampling_params={"max_tokens": 1}) for number in numbers]
    assert jobs[-1].done.wait(60)  # results are read when everything is done, so that all that is removed is
    assert [len(samples(job)[0]) for job in jobs[-4:]] == [2] * 4
    assert service.job(f"{sampler}:1") is jobs[-1]
    samples(sample(service, sampler, 16))
    files = service.samplers[sampler].files
    assert sorted(int(path.name[:8]) for path in files.requests.iterdir()) == [14, 15, 16]


@pytest.mark.parametrize("most", [1, 2])
def test_models_that_do_not_fit_in_memory_come_back_from_disk_to_the_same_bits(base, tmp_path, monkeypatch, most):
    """Three models of one owner in turns, where fewer may be in memory, and one of another owner."""

    def run(name):
        service = Service(base, "llama", tmp_path / name, torch.float32)
        clients = [Client(service, seed=seed) for seed in (1, 2, 3)] + [Client(service, seed=4, owner="other")]
        results = [result(job) for _ in range(3) for client in clients for job in client.learn()]
        loaded = [service.model(client.model).learner is not None for client in clients]
        service.close()
        clients[0].service = Service(base, "llama", tmp_path / name, torch.float32)
        results += [result(job) for job in clients[0].learn()]
        clients[0].service.close()
        return results, loaded

    want, loaded = run("all")
    assert loaded == [True] * 4
    monkeypatch.setattr(of_service, "MOST_LOADED", most)
    found, loaded = run("few")
    assert found == want
    assert loaded == [False, most == 2, True, True]


def test_a_model_whose_gradient_waits_stays_in_memory(service, monkeypatch):
    monkeypatch.setattr(of_service, "MOST_LOADED", 1)
    client, body = Client(service), json.dumps({"adam_params": adam(1e-2)}).encode()
    job = service.ask(client.model, 1, "forward_backward", supervised(client.model, 1, TOKENS))
    assert result(job)[0] == "pb"
    words = "gradients wait in 1 models, and no more may be in memory; send optim_step"
    assert error(service.job(f"{Client(service).model}:0")) == words
    assert answer(service.ask(client.model, 2, "optim_step", body))["metrics"]["grad_norm"] > 0
    answer(service.job(f"{Client(service).model}:0"))


@pytest.mark.parametrize("refused", [{"adam_params": adam(-1.0)}, {"optimizer_params": {"type": "dimuon"}}])
def test_a_gradient_that_waits_outlives_a_refused_step_and_a_restart(base, tmp_path, monkeypatch, refused):
    """A state that were kept after the refusal would lack it."""
    monkeypatch.setattr(of_service, "KEEP_STATE_S", 0.0)
    client = Client(Service(base, "llama", tmp_path / "state", torch.float32))
    result(client.gradient())
    error(client.ask("optim_step", **refused))
    client.service.close()
    client.service = Service(base, "llama", tmp_path / "state", torch.float32)
    try:
        assert answer(client.ask("optim_step", adam_params=adam(1e-2)))["metrics"]["grad_norm"] > 0
    finally:
        client.service.close()


def test_gradients_wait_across_a_save_and_a_refused_load_and_a_load_drops_them(service):
    client, norms = Client(service), []
    path = answer(client.ask("save_weights", path="one"))["path"]
    for change in (
        {"kind": "save_weights", "path": "two"},
        {"kind": "load_weights", "path": "tinker://a/weights/b", "optimizer": True},
        {"kind": "load_weights", "path": path, "optimizer": False},
    ):
        result(client.gradient())
        result(client.ask(**change))
        norms.append(answer(client.ask("optim_step", adam_params=adam(1e-2)))["metrics"]["grad_norm"])
    assert [norm > 0 for norm in norms] == [True, True, False]


def test_models_are_computed_again_before_new_gradients_take_their_room(base, tmp_path, monkeypatch):
    """A holds a gradient, B waits for its first one, and C was trained: if B came before C, C would have no room."""
    monkeypatch.setattr(of_service, "MOST_LOADED", 2)
    monkeypatch.setattr(of_service, "KEEP_STATE_S", 1e9)

    def run(name, *, again):
        sessions = iter("abc")
        monkeypatch.setattr(of_service.secrets, "token_hex", lambda _: next(sessions))
        service = Service(base, "llama", tmp_path / name, torch.float32)
        clients = [Client(service, seed=seed) for seed in (1, 2, 3)]
        [a, b, c] = clients
        result(a.learn()[1])
        result(c.learn()[1])
        result(a.gradient())
        if again:
            service.close()
            b.gradient()  # acknowledged, and not done
            service = Service(base, "llama", tmp_path / name, torch.float32)
            for client in clients:
                client.service = service
        else:
            b.gradient()
        result(service.job(f"{b.model}:1"))
        result(b.ask("optim_step", adam_params=adam(1e-2)))
        results = [result(job) for job in c.learn()]
        service.close()
        return results

    assert run("whole", again=False) == run("again", again=True)


def test_numbers_that_name_no_file_are_refused(service):
    client = Client(service)
    sampler = service.add_sampler(client.session, 0, None)
    for number in (-1, 10**8, 10**300):
        with pytest.raises(Refused, match=f"seq_id={number}"):
            service.ask(client.model, number, "optim_step", b"{}")
        with pytest.raises(Refused, match=f"seq_id={number}"):
            sample(service, sampler, number)
        with pytest.raises(Refused, match=f"sampling_session_seq_id={number}"):
            service.add_sampler(client.session, number, None)


def test_weights_that_were_loaded_stay_those_of_their_time(base, tmp_path, monkeypatch):
    """Also where their folder holds others when the service begins anew."""
    monkeypatch.setattr(of_service, "KEEP_STATE_S", 1e9)

    def run(name, *, again):
        service = Service(base, "llama", tmp_path / name, torch.float32)
        client = Client(service)
        client.learn()
        path = answer(client.ask("save_weights", path="one"))["path"]
        other = f"{client.session}:train:1"
        answer(service.ask(other, 0, "load_weights", json.dumps({"path": path, "optimizer": True}).encode()))
        client.learn(rate=0.1)
        answer(client.ask("save_weights", path="one", overwrite=True))
        if again:
            service.close()
            service = client.service = Service(base, "llama", tmp_path / name, torch.float32)
        assert service.model(other).spec.rank == 4
        client.model, client.number = other, 1
        results = [result(job) for job in client.learn()]
        service.close()
        return results

    assert run("whole", again=False) == run("again", again=True)


def test_a_disk_that_is_full_for_a_moment_costs_a_result_and_no_thread(service, monkeypatch):
    """The result of a step, the state after another, and the samples of a sampler."""
    monkeypatch.setattr(of_service, "KEEP_STATE_S", 0.0)
    write_file, write_folder, full = of_service.write_file, of_service.write_folder, set()

    def no_room(path):
        if path.parent.name in full or path.name in full:
            raise OSError(28, "No space left on device", str(path))

    def file(path, content):
        no_room(path)
        write_file(path, content)

    def folder(path):
        no_room(path)
        return write_folder(path)

    monkeypatch.setattr(of_service, "write_file", file)
    monkeypatch.setattr(of_service, "write_folder", folder)
    client = Client(service)
    sampler = client.sampler()
    full.add("results")
    for job in (client.learn()[1], sample(service, sampler)):
        assert "its result could not be kept: OSError: [Errno 28]" in error(job)
    full.remove("results")
    full.add("state")
    answer(client.learn()[1])
    full.clear()
    answer(client.learn()[1])
    assert len(samples(sample(service, sampler, 1))[0]) == 2
    service.close()
    assert of_service._number(service.model(client.model).folder / "state") == client.number - 1


def test_one_service_at_a_time_has_a_folder(service, base):
    with pytest.raises(FolderInUse, match="^state=.* is in use .* choose another state$"):
        Service(base, "llama", service.folder, torch.float32)


def test_states_are_saved_listed_loaded_and_removed(service):
    client = Client(service)
    client.learn()
    path = answer(client.ask("save_weights", path="one"))["path"]
    assert path == f"tinker://{client.model}/weights/one"
    assert "a state of this name exists" in error(client.ask("save_weights", path="one"))
    assert "a name has letters" in error(client.ask("save_weights", path="../../etc"))
    answer(client.ask("save_weights", path="one", overwrite=True))
    want = [result(job) for job in client.learn()]
    body = json.dumps({"path": path, "optimizer": True}).encode()
    answer(service.ask(f"{client.session}:train:1", 0, "load_weights", body))
    client.model, client.number = f"{client.session}:train:1", 1
    assert [result(job) for job in client.learn()] == want
    model = service.model(f"{client.session}:train:0")
    assert [checkpoint["checkpoint_id"] for checkpoint in service.checkpoints(model)] == ["weights/one"]
    service.delete_checkpoint(model, "weights/one")
    assert service.checkpoints(model) == []
    assert "no weights are saved here" in error(client.ask("load_weights", path=path, optimizer=False))


def test_named_weights_stay_those_of_their_samplers(service):
    client = Client(service)
    path = answer(client.ask("save_weights_for_sampler", path="latest"))["path"]
    living, other = (service.add_sampler(client.session, number, path) for number in (100, 101))
    want = samples(sample(service, living, sampling_params={"seed": 3}))[1]
    result(client.learn(rate=0.1)[1])
    assert "samplers may have them; choose another" in error(client.ask("save_weights_for_sampler", path="latest"))
    assert samples(sample(service, other, sampling_params={"seed": 3}))[1] == want


def test_a_sampler_never_gets_other_weights_under_the_path_of_its_own(base, tmp_path):
    """They were deleted and saved again, or overwritten, while a sample waits. Also after a restart."""
    service = Service(base, "llama", tmp_path / "state", torch.float32)
    client = Client(service)
    named = answer(client.ask("save_weights_for_sampler", path="one"))["path"]
    state = answer(client.ask("save_weights", path="two"))["path"]
    samplers = [service.add_sampler(client.session, number, path) for number, path in enumerate((named, state), 100)]
    for sampler in samplers:
        samples(sample(service, sampler))
    result(client.learn(rate=0.1)[1])
    service.delete_checkpoint(service.model(client.model), "sampler_weights/one")
    assert "no weights are saved here" in error(sample(service, samplers[0], 1))
    answer(client.ask("save_weights_for_sampler", path="one"))
    answer(client.ask("save_weights", path="two", overwrite=True))
    service.close()
    waiting = [sample(service, sampler, 2).request_id for sampler in samplers]
    service = Service(base, "llama", tmp_path / "state", torch.float32)
    try:
        for request_id in waiting:
            assert "no longer those of this sampler; create another" in error(service.job(request_id))
        samples(sample(service, service.add_sampler(client.session, 102, named)))
    finally:
        service.close()


def test_weights_that_are_deleted_while_they_are_read_are_the_callers_mistake(service, monkeypatch):
    client = Client(service)
    path = answer(client.ask("save_weights_for_sampler", path="one"))["path"]
    sampler, tensors_of = service.add_sampler(client.session, 100, path), of_sampler.tensors_of

    def delete_first(*of):
        service.delete_checkpoint(service.model(client.model), "sampler_weights/one")
        return tensors_of(*of)

    monkeypatch.setattr(of_sampler, "tensors_of", delete_first)
    assert error(sample(service, sampler)) == "weights 'one' were deleted or replaced while they were read; ask again"


@pytest.mark.parametrize("when", ["before", "after"])
def test_weights_that_others_replace_while_they_are_read_are_nobodys_samples(service, monkeypatch, when):
    """The path names other weights then, and a sampler is of those that it was made of."""
    client = Client(service)
    path = answer(client.ask("save_weights", path="one"))["path"]
    sampler, hold = service.add_sampler(client.session, 100, path), service.sampler.hold_weights
    samples(sample(service, sampler))
    result(client.learn()[1])
    service.sampler.of = ""

    def replace_meanwhile(name, folder):
        if when == "after":
            hold(name, folder)
        service.delete_checkpoint(service.model(client.model), "weights/one")
        answer(client.ask("save_weights", path="one"))
        if when == "before":
            hold(name, folder)

    monkeypatch.setattr(service.sampler, "hold_weights", replace_meanwhile)
    assert "were deleted or replaced while they were read" in error(sample(service, sampler, number=2))
    monkeypatch.undo()
    assert "no longer those of this sampler" in error(sample(service, sampler, number=3))
    answer(client.ask("load_weights", path=path, optimizer=True))


def test_a_state_that_is_replaced_while_it_is_read_is_not_loaded(service, monkeypatch):
    """Its files would be of two saves."""
    client = Client(service)
    path, tensors_of = answer(client.ask("save_weights", path="one"))["path"], of_service.tensors_of

    def replace_meanwhile(folder):
        tensors = tensors_of(folder)
        service._write(service.model(client.model), folder, 99)
        return tensors

    monkeypatch.setattr(of_service, "tensors_of", replace_meanwhile)
    assert "deleted or replaced while" in error(client.ask("load_weights", path=path, optimizer=True))


def test_readers_of_weights_that_are_deleted_meanwhile_are_told_so(service, monkeypatch):
    """A server that is asked for weights that have just gone has no fault."""
    client = Client(service)
    paths = [answer(client.ask("save_weights", path=name))["path"] for name in ("one", "two")]
    model, folder_of = service.model(client.model), service.folder_of

    def delete_after(path):
        folder = folder_of(path)
        shutil.rmtree(folder)
        return folder

    monkeypatch.setattr(service, "folder_of", delete_after)
    with pytest.raises(Refused, match="were deleted or replaced while"):
        service.spec_of(paths[0])
    monkeypatch.undo()
    with monkeypatch.context() as patch:
        patch.setattr(of_service.time, "gmtime", lambda at: shutil.rmtree(model.folder / "weights" / "two") or 0)
        patch.setattr(of_service.time, "strftime", lambda *_: (model.folder / "weights" / "two").stat())
        assert service.checkpoints(model) == []


def test_deletions_at_once_are_one_and_refusals(service, monkeypatch):
    client = Client(service)
    answer(client.ask("save_weights", path="one"))
    model, told, remove = service.model(client.model), [], of_service._remove
    monkeypatch.setattr(of_service, "_remove", lambda folder: time.sleep(0.05) or remove(folder))

    def delete():
        try:
            told.append(service.delete_checkpoint(model, "weights/one"))
        except Exception as refused:
            told.append(str(refused))

    threads = [threading.Thread(target=delete) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told.count(None) == 1
    assert sum("no weights are saved here" in words for words in told if words) == 7


@pytest.mark.parametrize("after", [":/../../../evil", ":x", ":train:0", ":", ":\0", ":" + "a" * 300])
def test_what_only_begins_with_a_session_is_none(service, tmp_path, after):
    """The session is part of the folder's name of a model or sampler."""
    session = service.create_session({}) + after
    with pytest.raises(Unknown):
        service.add_sampler(session, 0, None)
    with pytest.raises(Unknown):
        service.ask(f"{session}:train:0", 0, "create_model", b"{}")
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    assert not list((tmp_path / "state/models").iterdir())
    assert not list((tmp_path / "state/samplers").iterdir())


def test_sessions_without_models_and_samplers_make_room(service, tmp_path, monkeypatch):
    monkeypatch.setattr(of_service, "MOST_SESSIONS", 3)
    client = Client(service, owner="a")
    sessions = [service.create_session({"owner": "a"}) for _ in range(2)]
    other = service.create_session({"owner": "b"})
    sessions.append(service.create_session({"owner": "a"}))
    assert set(service.sessions) == {client.session, other, *sessions[1:]}
    assert {path.stem for path in (tmp_path / "state/sessions").iterdir()} == set(service.sessions)
    for session in sessions[1:]:
        service.add_sampler(session, 0, None)
    with pytest.raises(Refused, match="there are 3 sessions with models or samplers; go on in one of them"):
        service.create_session({"owner": "a"})
    service.create_session({"owner": "b"})


def test_a_number_of_a_sampler_is_of_one_path(service):
    client = Client(service)
    path = answer(client.ask("save_weights", path="one"))["path"]
    sampler = service.add_sampler(client.session, 5, path)
    assert service.add_sampler(client.session, 5, path) == sampler
    for other in (None, answer(client.ask("save_weights", path="two"))["path"]):
        with pytest.raises(Refused, match=r"sampling_session_seq_id=5: it is a sampler of tinker://.*/one already"):
            service.add_sampler(client.session, 5, other)
    assert "is a sampler of" in error(client.ask("save_weights_for_sampler", sampling_session_seq_id=5))


def test_saves_and_deletions_that_were_killed_half_way_are_whole_or_nothing(base, tmp_path):
    service = Service(base, "llama", tmp_path / "state", torch.float32)
    client = Client(service)
    paths = [answer(client.ask("save_weights", path=name))["path"] for name in ("one", "two")]
    folder = service.model(client.model).folder / "weights"
    service.close()
    (folder / "one").rename(folder / ".one.replaced")  # another was to take its place
    (folder / "two").rename(folder / ".two.removed")
    client.service = Service(base, "llama", tmp_path / "state", torch.float32)
    try:
        answer(client.ask("load_weights", path=paths[0], optimizer=True))
        assert "no weights are saved here" in error(client.ask("load_weights", path=paths[1], optimizer=True))
        assert [path.name for path in folder.iterdir()] == ["one"]
    finally:
        client.service.close()


def test_samples_that_cannot_be_are_refused_by_name(service):
    """By what reads them (see test_sampler.py), and by what the policy has room and tokens for."""
    sampler = service.add_sampler(service.create_session({}), 0, None)
    other_token = {"chunks": [{"type": "encoded_text", "tokens": [10**6]}]}
    refusals = [
        ({"sampling_params": {"top_k": 3}}, "top_k and top_p"),
        ({"sampling_params": {"max_tokens": 100}}, "the context is 64 tokens"),
        ({"sampling_params": {"stop": [10**6]}}, "outside the vocabulary"),
        ({"sampling_params": {"max_tokens": 0}}, "max_tokens=0: use 1 or more"),
        ({"sampling_params": {"max_tokens": -3}}, "max_tokens=-3: use 1 or more"),
        ({"prompt": other_token}, "vocabulary"),
    ]
    for number, (changes, words) in enumerate(refusals):
        assert words in error(sample(service, sampler, number, **changes))
    assert len(samples(sample(service, sampler, len(refusals)))[0]) == 2  # and it goes on


def test_stops_are_heeded(service):
    sampler = service.add_sampler(service.create_session({}), 0, None)
    [tokens, _], _, message = samples(sample(service, sampler, sampling_params={"seed": 1, "stop": []}))
    assert len(tokens) == 8
    cut = samples(sample(service, sampler, 1, sampling_params={"seed": 1, "stop": [tokens[3]]}))
    assert cut[0][0] == tokens[: tokens.index(tokens[3]) + 1]
    assert message.sequences[0].stop_reason == messages.STOP_REASON_LENGTH
    assert cut[2].sequences[0].stop_reason == messages.STOP_REASON_STOP


def test_models_that_cannot_be_are_refused_and_say_so_later(service):
    usual = {"base_model": "llama", "lora_config": {"rank": 4}}
    for changes, words in (
        ({"base_model": "other"}, "this server has 'llama'"),
        ({"lora_config": {"rank": -1}}, "rank=-1"),
        ({"lora_config": {"rank": 4, "seed": 2**70}}, f"seed={2**70}"),
        ({"optimizer_config": {"type": "dimuon"}}, "has adamw"),
    ):
        model = f"{service.create_session({})}:train:0"
        assert words in error(service.ask(model, 0, "create_model", json.dumps(usual | changes).encode()))
        step = json.dumps({"adam_params": adam(1)}).encode()
        assert "could not be made" in error(service.ask(model, 1, "optim_step", step))
    client = Client(service)
    paths = [answer(client.ask(f"save_weights{kind}", path="one"))["path"] for kind in ("", "_for_sampler")]
    for changes, words in (
        ({"path": paths[1]}, "have no state of an optimizer"),
        ({"path": paths[0], "base_model": "other"}, "this server has 'llama'"),
        ({"path": paths[0], "optimizer_config": {"type": "dimuon"}}, "has adamw"),
    ):
        model = f"{service.create_session({})}:train:0"
        body = json.dumps({"optimizer": True} | changes).encode()
        assert words in error(service.ask(model, 0, "load_weights", body))
        assert "could not be made" in error(service.ask(model, 1, "optim_step", step))
        assert "could not be made" in error(service.ask(model, 2, "load_weights", loads(paths[0])))


def test_what_is_not_there_is_named(service):
    for ask in (
        lambda: service.session("none"),
        lambda: service.ask("none:train:0", 1, "optim_step", b"{}"),
        lambda: service.ask_sampler("none:sample:0", 0, b"{}"),
        lambda: service.job("none:1"),
    ):
        with pytest.raises(Unknown, match="none"):
            ask()
    for path in ("tinker://a/weights/b", "tinker://../weights/b", "/etc/passwd", "tinker://a/b/c/d"):
        with pytest.raises(Refused, match="no weights are saved here"):
            service.add_sampler(service.create_session({}), 0, path)


def test_old_requests_and_results_are_not_kept(base, tmp_path, monkeypatch):
    monkeypatch.setattr(of_service, "KEEP_STATE_S", 0.0)
    monkeypatch.setattr(of_service, "RESULTS", 3)
    service = Service(base, "llama", tmp_path / "state", torch.float32)
    client = Client(service)
    last = [job for _ in range(4) for job in client.learn()][-1]
    result(last)
    service.close()
    folder: Path = service.models[client.model].files.results
    assert sorted(int(path.name[:8]) for path in folder.iterdir()) == [6, 7, 8]
    assert not list(service.models[client.model].files.requests.iterdir())
    with pytest.raises(Unknown):
        service.job(f"{client.model}:1")


def test_results_are_in_files_and_those_of_samplers_whose_weights_are_gone_are_removed(service, monkeypatch):
    """Samplers that come and go with the steps of a loop leave nothing, and a sample reads no earlier request."""
    monkeypatch.setattr(of_service, "UNNAMED", 2)
    client, jobs = Client(service), []
    with monkeypatch.context() as context:
        context.setattr(of_service.Requests, "stored", lambda files: 1 / 0)
        for _ in range(4):
            sampler = client.sampler()
            jobs.append([sample(service, sampler, number) for number in range(2)])
            assert [len(samples(job)[0]) for job in jobs[-1]] == [2, 2]
    files = [of[0].owner.files for of in jobs]
    kept = [[len(list(part.iterdir())) for part in (each.requests, each.results)] for each in files]
    assert kept == [[0, 0]] * 2 + [[2, 2]] * 2
    assert all(job.result is None for job in service.jobs.values())
    with pytest.raises(Unknown):
        service.job(jobs[0][0].request_id)
    with pytest.raises(Unknown, match="no longer kept"):
        jobs[0][0].read()
    assert "no weights are saved here" in error(sample(service, jobs[0][0].owner.id, 9))


def test_a_damaged_or_exchanged_file_of_weights_is_refused_by_name(base, tmp_path, monkeypatch):
    """What was saved, what a sampler has, and the state with which a service goes on."""
    monkeypatch.setattr(of_service, "KEEP_STATE_S", 0.0)
    first = Service(base, "llama", tmp_path / "state", torch.float32)
    client = Client(first)
    client.learn()
    paths = [answer(client.ask("save_weights", path=name))["path"] for name in ("one", "two")]
    result(client.learn(rate=0.1)[1])
    paths.append(answer(client.ask("save_weights", path="three"))["path"])
    four = answer(client.ask("save_weights_for_sampler", path="four"))["path"]
    first.close()
    folder = first.models[client.model].folder
    one, two, three = (folder / "weights" / name for name in ("one", "two", "three"))
    flip(one / "policy.safetensors")
    (two / "optimizer.safetensors").write_bytes((three / "optimizer.safetensors").read_bytes())  # of another step
    spec = json.loads((three / "spec.json").read_text())
    del spec["files"]
    (three / "spec.json").write_text(json.dumps(spec))  # as version 0.2 wrote it: no checksum
    flip(folder / "sampler_weights/four/policy.safetensors")
    flip(folder / "state/policy.safetensors")
    second = Service(base, "llama", tmp_path / "state", torch.float32)
    try:
        other = Client(second)
        found = [second.ask(other.model, number + 1, "load_weights", loads(path)) for number, path in enumerate(paths)]
        for job, part, file in zip(found, ("one", "two"), ("policy", "optimizer"), strict=False):
            assert f"weights/{part} is damaged: {file}.safetensors is" in error(job)
        answer(found[2])
        sampler = second.add_sampler(other.session, 0, four)
        assert "four is damaged: policy.safetensors is" in error(sample(second, sampler))
        client.service = second
        assert "state is damaged: policy.safetensors is" in error(client.learn()[1])
    finally:
        second.close()


def test_a_damaged_request_or_result_is_refused_by_name(base, tmp_path):
    first = Service(base, "llama", tmp_path / "state", torch.float32)
    sampler = first.add_sampler(first.create_session({}), 0, None)
    samples(sample(first, sampler))
    first.close()
    waiting = sample(first, sampler, 1).request_id
    files = first.samplers[sampler].files
    for path in (files.requests / next(iter(files.requests.glob("00000001.*"))), *files.results.iterdir()):
        flip(path)
    second = Service(base, "llama", tmp_path / "state", torch.float32)
    try:
        assert "00000001.sample is damaged" in error(second.job(waiting))
        with pytest.raises(Refused, match=r"00000000\.pb is damaged"):
            second.job(f"{sampler}:0").read()
    finally:
        second.close()
    (tmp_path / "state/sessions/a.json").write_text("{")
    with pytest.raises(ValueError, match=r"sessions/a\.json is damaged"):
        Service(base, "llama", tmp_path / "state", torch.float32)


DAMAGES = [lambda path: flip(path), lambda path: flip(path, 0), lambda path: path.write_bytes(b"")]


@pytest.mark.parametrize("damage", DAMAGES, ids=["last bytes", "first byte", "empty"])
def test_a_model_whose_request_was_damaged_computes_nothing_after_it(base, tmp_path, monkeypatch, damage):
    """Else the next step would be made without its gradient."""
    monkeypatch.setattr(of_service, "KEEP_STATE_S", 1e9)
    first = Service(base, "llama", tmp_path / "state", torch.float32)
    client = Client(first)
    for job in client.learn():
        result(job)
    first.close()
    [path] = first.models[client.model].files.requests.glob("00000001.*")
    damage(path)
    monkeypatch.setattr(of_service, "KEEP_STATE_S", 0.0)
    for _ in range(2):  # nothing that is kept afterwards hides it
        learns_nothing_after_a_restart(client, base, tmp_path / "state", "00000001.forward_backward is damaged")


def test_requests_and_sessions_of_version_0_2_are_taken_up(base, tmp_path):
    """Its files are as they were sent, and its sessions no owner."""
    first = Service(base, "llama", tmp_path / "state", torch.float32)
    session = first.create_session({})
    sampler = first.add_sampler(session, 0, None)
    want = samples(sample(first, sampler))[:2]
    first.close()
    waiting = sample(first, sampler, 1).request_id
    files = first.samplers[sampler].files
    for path in (*files.requests.iterdir(), *files.results.iterdir()):
        path.with_suffix("").write_bytes(path.read_bytes().partition(b"\n")[2])
        path.unlink()
    (tmp_path / f"state/sessions/{session}.json").write_text('{"tags": [], "metadata": null, "at": 1.5}')
    second = Service(base, "llama", tmp_path / "state", torch.float32)
    try:
        assert samples(second.job(f"{sampler}:0"))[:2] == want
        assert len(samples(second.job(waiting))[0]) == 2
        assert second.owns("somebody", session)
        assert second.owns("", session)
    finally:
        second.close()


def test_a_model_whose_load_cannot_be_done_again_computes_nothing_after_it(base, tmp_path, monkeypatch):
    """Else it would go on with the weights that it had before. No state was kept, since the disk was full."""
    service = Service(base, "llama", tmp_path / "state", torch.float32)
    client, other = Client(service), Client(service)
    path = answer(other.ask("save_weights", path="one"))["path"]
    client.learn()
    with monkeypatch.context() as full:
        full.setattr(of_service.Service, "_keep_learner", lambda *_: 1 / 0)
        answer(client.ask("load_weights", path=path, optimizer=True))
        service.close()
    service.delete_checkpoint(service.model(other.model), "weights/one")
    learns_nothing_after_a_restart(client, base, tmp_path / "state", "request 3 cannot be done again: path 'tinker://")


def learns_nothing_after_a_restart(client, base, state, why):
    """Every request of the client is refused for this reason by a server that begins with the state."""
    client.service = Service(base, "llama", state, torch.float32)
    try:
        for job in client.learn():
            assert why in error(job)
    finally:
        client.service.close()


def flip(path, place=-3):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def loads(path):
    return json.dumps({"path": path, "optimizer": True}).encode()


def test_a_service_that_was_killed_by_the_system_goes_on_with_what_waited(base, tmp_path):
    """It begins with a copy of the folder, taken while a sample and requests of a model wait, one of them for a number
    that never comes. SIGKILL leaves the same, but a fork of a process with threads may hang."""
    left, over = tmp_path / "left", threading.Event()
    first = Service(base, "llama", tmp_path / "state", torch.float32)
    first._do = lambda *_: over.wait(60)  # nothing is done
    try:
        client = Client(first)
        client.learn()
        client.number += 1
        client.learn()
        sampler = first.add_sampler(client.session, 99, None)
        asked = [sample(first, sampler, number).request_id for number in range(2)]
        shutil.copytree(tmp_path / "state", left)
    finally:
        over.set()
        first.close()
    second = Service(base, "llama", left, torch.float32)
    try:
        assert [len(samples(second.job(request_id))[0]) for request_id in asked] == [2, 2]
        assert result(second.job(f"{client.model}:1"))[0] == "pb"
        answer(second.job(f"{client.model}:2"))
        assert not second.job(f"{client.model}:4").done.is_set()
        answer(second.ask(client.model, 3, "optim_step", json.dumps({"adam_params": adam(1e-2)}).encode()))
        answer(second.job(f"{client.model}:5"))
    finally:
        second.close()

"""What a sampler holds, what it is asked, and the log-probabilities that it gives."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch

from grpo.tinker import sampler as of_sampler
from grpo.tinker.model import Spec, learner_of, load_state, state_of
from grpo.tinker.sampler import MOST_SAMPLES, Sampler, read
from grpo.tinker.wire import Refused
from policies import tensor_files
from policies.files.checksums import fault, size_and_hash
from policies.logprobs import logprobs_from_hidden
from rollout.decoding.engine import Engine
from rollout.group import Prompt
from rollout.sampling import SamplingParams

PROMPT = [5, 9, 12, 7]
STOPS = (2,)


def request_of(**changes):
    sampling = {"max_tokens": 6} | changes.pop("sampling_params", {})
    request = {"prompt": {"chunks": [{"type": "encoded_text", "tokens": PROMPT}]}, "num_samples": 3}
    return request | {"sampling_params": sampling} | changes


def asked(key="client", **changes):
    return read(request_of(**changes), key, STOPS, 64)


@pytest.fixture
def saved(base, tmp_path):
    """`saved(seed)`: the folder of adapters that move the base far."""

    def save(seed):
        spec, folder = Spec(rank=2, seed=seed), tmp_path / f"adapters{seed}"
        learner = learner_of(base, spec)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in learner.policy.trunk.parameters():
                if parameter.requires_grad:
                    parameter.copy_(0.3 * torch.randn_like(parameter))
        folder.mkdir()
        tensor_files.write(state_of(learner, optimizer=False), folder)
        (folder / "spec.json").write_text(json.dumps(asdict(spec)))
        return folder

    return save


def tokens(sampler, **changes):
    found, _ = sampler.sample(asked(**changes))
    return [one.token_ids for one in found]


# ---- whose weights it holds ------------------------------------------------------------------------------------------


def test_it_takes_the_weights_of_one_sampler_after_the_other(base, saved):
    one, other = saved(1), saved(2)
    sampler, fresh = Sampler(base, torch.float32), Sampler(base, torch.float32)
    plain = tokens(sampler)
    found = {}
    for name, of in (("one", one), ("other", other), ("base", None), ("one", one)):
        sampler.hold_weights(name, of)
        found.setdefault(name, []).append(tokens(sampler))
    assert found["one"][0] == found["one"][1]
    assert found["base"] == [plain]
    assert len({str(each) for each in (plain, found["one"][0], found["other"][0])}) == 3
    fresh.hold_weights("other", other)
    assert [tokens(fresh)] == found["other"]


def test_weights_that_it_holds_are_not_published_again(base, saved, monkeypatch):
    sampler, versions = Sampler(base, torch.float32), []
    publish = sampler.engine.sync_weights

    def noted(weights, version):
        versions.append(version)
        publish(weights, version)

    monkeypatch.setattr(sampler.engine, "sync_weights", noted)
    folder = saved(1)
    for name in ("one", "one", "one"):
        sampler.hold_weights(name, folder)
    assert versions == [1]
    sampler.hold_weights("base", None)
    assert versions == [1, 2]  # no version stands for two weights


def test_files_that_stay_as_they_are_are_compared_with_their_checksums_once(base, saved, monkeypatch):
    """A sampler that comes back in turns does not read all of them again. One that was changed is seen."""
    folder, sampler, checked = saved(1), Sampler(base, torch.float32), []
    sums = {file.name: size_and_hash(file) for file in folder.glob("*.safetensors")}
    spec = json.loads((folder / "spec.json").read_text())
    (folder / "spec.json").write_text(json.dumps(spec | {"files": sums}))
    monkeypatch.setattr(of_sampler, "fault", lambda *of: checked.append(of) or fault(*of))
    for name in ("one", "base", "one", "base"):
        sampler.hold_weights(name, folder if name == "one" else None)
    assert checked == [(folder, "spec.json")]
    content = bytearray((folder / "policy.safetensors").read_bytes())
    content[-3] ^= 1
    (folder / "policy.safetensors").write_bytes(content)
    with pytest.raises(Refused, match=r"is damaged: policy\.safetensors is"):
        sampler.hold_weights("one", folder)


def test_where_it_fails_to_take_weights_it_holds_nobodys(base, saved, monkeypatch):
    """The engine may have taken a part of them. The sampler before, too, is published again before it answers."""
    one, other = saved(1), saved(2)
    sampler = Sampler(base, torch.float32)
    sampler.hold_weights("one", one)
    want = tokens(sampler)
    derive = sampler.engine._derive
    with monkeypatch.context() as patch:
        patch.setattr(sampler.engine, "_derive", lambda: 1 / 0)  # it has the tensors by then
        with pytest.raises(ZeroDivisionError):
            sampler.hold_weights("other", other)
        assert sampler.of == ""
    assert sampler.engine._derive == derive
    sampler.hold_weights("one", one)
    assert tokens(sampler) == want
    assert sampler.of == "one"


# ---- what is asked ---------------------------------------------------------------------------------------------------


def test_a_request_is_read():
    found = asked(sampling_params={"temperature": 0.5, "seed": 7, "stop": ["\n"], "top_k": -1, "top_p": 1})
    params = SamplingParams(3, 0.5, 6, STOPS, stop_strings=("\n",), seed=7)
    assert (found.prompt, found.params, found.key, found.last) == (PROMPT, params, "", 0)
    plain = read({"prompt": request_of()["prompt"], "sampling_params": {}}, "client", STOPS, 64)
    assert (plain.key, plain.last) == ("client", 0)
    assert (plain.params.group_size, plain.params.temperature, plain.params.seed) == (1, 1.0, 0)
    assert (plain.params.stop_token_ids, plain.params.stop_strings) == (STOPS, ())
    chunks = [{"tokens": [5, 9]}, {"type": "encoded_text", "tokens": [12]}]
    assert asked(prompt={"chunks": chunks}).prompt == [5, 9, 12]


def test_what_ends_a_sample():
    for stop, ids, strings in (
        (None, STOPS, ()),
        ([], (), ()),  # asked for: no token ends it
        ("a", STOPS, ("a",)),
        (["a", "b"], STOPS, ("a", "b")),
        ([3, 4], (3, 4), ()),
    ):
        params = asked(sampling_params={"stop": stop}).params
        assert (params.stop_token_ids, params.stop_strings) == (ids, strings)


def test_a_seed_is_the_noise_whoever_asks(base):
    """Without one the noise depends on where a request came from, so that two clients get two samples."""
    sampler = Sampler(base, torch.float32)
    zero = {"seed": 0}
    assert tokens(sampler, key="a", sampling_params=zero) == tokens(sampler, key="b", sampling_params=zero)
    assert tokens(sampler, key="a") == tokens(sampler, key="a")
    assert tokens(sampler, key="a") != tokens(sampler, key="b")
    assert tokens(sampler, sampling_params={"seed": 1}) != tokens(sampler, sampling_params={"seed": 2})


def test_what_cannot_be_sampled_is_refused_by_name():
    for changes, words in (
        ({"topk_prompt_logprobs": 3}, "topk_prompt_logprobs: not here"),
        ({"prompt": {"chunks": [{"type": "image", "tokens": []}]}}, "a chunk of type image"),
        ({"prompt": {"chunks": []}}, "it has no token; send at least one"),
        ({"sampling_params": {"top_k": 5}}, "top_k and top_p would change the distribution"),
        ({"sampling_params": {"top_p": 0.9}}, "top_k and top_p would change the distribution"),
        ({"num_samples": 0}, f"num_samples=0: use 1 to {MOST_SAMPLES}"),
        ({"num_samples": MOST_SAMPLES + 1}, f"use 1 to {MOST_SAMPLES}"),
        ({"prompt_logprobs": True, "prompt_logprobs_last_n": 4}, "prompt_logprobs_last_n=4: use 1 to 3"),
        ({"prompt_logprobs": True, "prompt_logprobs_last_n": -1}, "prompt_logprobs_last_n=-1: use 1 to 3"),
    ):
        with pytest.raises(Refused, match=words):
            asked(**changes)


def test_the_bounds_themselves_are_taken():
    assert asked(num_samples=MOST_SAMPLES).params.group_size == MOST_SAMPLES
    assert asked(sampling_params={"top_k": 0}).params.group_size == 3
    assert asked(prompt_logprobs=True).last == 3
    assert asked(prompt_logprobs=True, prompt_logprobs_last_n=1).last == 1
    assert asked(prompt_logprobs=True, prompt={"chunks": [{"tokens": [5]}]}).last == 0
    assert asked(prompt_logprobs_last_n=2).last == 0  # of which nothing is asked


# ---- what it answers -------------------------------------------------------------------------------------------------


def test_a_sample_is_the_engines_up_to_the_end_of_the_context(base):
    sampler, room = Sampler(base, torch.float32), base.max_length - len(PROMPT)
    for most, length in ((6, 6), (None, room), (room, room)):
        request = asked(sampling_params={"max_tokens": most, "stop": [], "seed": 3})
        found, of_prompt = sampler.sample(request)
        params = replace(request.params, max_completion_tokens=length)
        [group] = Engine(base.merged(), torch.float32).sample([Prompt("", "", PROMPT)], params)
        assert [one.token_ids for one in found] == [c.token_ids for c in group.completions]
        assert [one.logprobs for one in found] == [c.logprobs for c in group.completions]
        assert [len(one.token_ids) for one in found] == [length] * 3
        assert {one.finish_reason for one in found} == {"length"}
        assert of_prompt is None
    first = found[0].token_ids
    cut, _ = sampler.sample(asked(sampling_params={"stop": [first[2]], "seed": 3}))
    assert (cut[0].token_ids, cut[0].finish_reason) == (first[: first.index(first[2]) + 1], "stop")


def test_no_sample_is_cut_short_in_silence(base):
    sampler, context = Sampler(base, torch.float32), base.max_length
    words = f"the context is {context} tokens: the prompt has 4, and max_tokens is {context}"
    with pytest.raises(Refused, match=words):
        sampler.sample(asked(sampling_params={"max_tokens": context}))
    full = {"chunks": [{"tokens": [5] * context}]}
    with pytest.raises(Refused, match=f"the prompt has {context}, and max_tokens is"):
        sampler.sample(asked(prompt=full, sampling_params={"max_tokens": None}))
    last = {"chunks": [{"tokens": [5] * (context - 1)}]}
    found, _ = sampler.sample(asked(prompt=last, sampling_params={"max_tokens": None}))
    assert [len(one.token_ids) for one in found] == [1] * 3
    with pytest.raises(Refused, match="temperature"):
        sampler.sample(asked(sampling_params={"temperature": -1.0}))


def test_log_probabilities_of_the_prompt_are_those_of_what_it_holds(base, saved):
    """The first token has none, and neither have those that nobody asked for."""
    folder = saved(1)
    sampler = Sampler(base, torch.float32)
    sampler.hold_weights("one", folder)
    trained = learner_of(base, Spec(rank=2, seed=1))
    load_state(trained, tensor_files.read(folder, {"policy"}), optimizer=False)
    with torch.no_grad():
        ids = torch.tensor([PROMPT])
        hidden = trained.policy.hidden(ids, torch.arange(4)[None], torch.zeros_like(ids))[0]
        expected, _ = logprobs_from_hidden(hidden[:-1], trained.policy.output, ids[0, 1:])
    for count, more in ((3, {}), (2, {"prompt_logprobs_last_n": 2})):
        _, found = sampler.sample(asked(prompt_logprobs=True, **more))
        assert len(found) == len(PROMPT)
        assert all(math.isnan(value) for value in found[:-count])
        assert found[-count:] == pytest.approx(expected[-count:].tolist(), abs=1e-4)

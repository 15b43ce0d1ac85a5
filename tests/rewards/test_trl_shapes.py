"""A function written for TRL works here, ours works when TRL calls it, and the examples in docstrings are true."""

import doctest
import importlib

import pytest

from rewards import BUILT_IN, RewardSpec, Scorer, load_reward, per_completion

MODULES = sorted(
    {*BUILT_IN.values(), *(f"rewards.{name}" for name in ("group_score", "protocol", "registry", "scorer"))}
)


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples(module):
    assert doctest.testmod(importlib.import_module(module)).failed == 0


@pytest.mark.parametrize("chat", [False, True])
def test_ours_take_what_trl_passes(chat):
    texts = ["<think>6 * 7</think><answer>42</answer>\n#### 42", "41"]
    completions = [[{"role": "assistant", "content": text}] for text in texts] if chat else texts
    logged = {}
    passed = {
        "prompts": [[{"role": "user", "content": "6 * 7?"}]] * 2 if chat else ["6 * 7?"] * 2,
        "completions": completions,
        "completion_ids": [[1, 2, 3], [4]],
        "answer": ["#### 42"] * 2,
        "trainer_state": object(),
        "log_extra": logged.__setitem__,
        "log_metric": lambda name, value: None,
    }

    @per_completion
    def length(completion_ids, log_extra):
        log_extra("length", len(completion_ids))
        return float(len(completion_ids))

    assert load_reward("gsm8k")(**passed) == [1.0, 0.0]
    assert load_reward("regex_format")(**passed, pattern="think") == [1.0, 0.0]
    assert load_reward("length_penalty")(**passed, target=1, per_token=0.5) == [-1.0, 0.0]
    assert length(**passed) == [3.0, 1.0]
    assert logged == {"length": [3, 1]}


def test_trl_functions_run_in_a_scorer(tmp_path):
    pytest.importorskip("trl")
    file = tmp_path / "from_trl.py"
    file.write_text(
        "from trl.rewards import get_soft_overlong_punishment, think_format_reward\n"
        "soft = get_soft_overlong_punishment(4, 2)\n"
    )
    specs = [RewardSpec(f"chat:{file}:think_format_reward"), RewardSpec(f"{file}:soft", weight=2.0)]
    with Scorer(specs, columns=["answer"], timeout_s=60) as scorer:
        [score] = scorer.score(
            ["p"],
            [["<think>\nso\n</think>\n42", "42"]],
            [{"answer": "42"}],
            prompt_ids=["a"],
            completion_ids=[[[0] * 2, [0] * 3]],
        )
    assert score.parts == {"think_format_reward": [1.0, 0.0], "soft": [0.0, -0.5]}
    assert score.rewards == [1.0, -1.0]

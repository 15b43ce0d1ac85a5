"""`quartet why` against brute force."""

from pathlib import Path

import pytest

from grpo.train import train
from grpo.why.explain import explain


@pytest.fixture(scope="module")
def run(micro_config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("why") / "run"
    train(micro_config(folder, **{"checkpoint.every": 2, "eval.limit": 8}))
    return folder


def test_try(run):
    from grpo.run.console import Terminal
    from grpo.why.report import show

    for step in (1, 2, 3):
        show(explain(run, step), Terminal(width=160))
    show(explain(run, 3, group=1, what_if=[["loss.advantage=rloo"], ["loss.beta=0.1"], ["rewards=[{function: gsm8k}]"]]), Terminal(width=160))

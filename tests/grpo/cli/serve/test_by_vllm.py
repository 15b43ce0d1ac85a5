"""`quartet serve --backend vllm`: what is refused before anything is loaded."""

import re

import pytest

from grpo.cli.parse import main


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "backend=vllm: there is no interpreter nowhere/python .* `make vllm`"),
        (["--rollout.margin", "2"], "rollout.margin=2.0 is for backend=native"),
        (["--replicas", "2"], "replicas=2 is for backend=native"),
        (["--follow"], "--follow is for backend=native"),
    ],
)
def test_what_vllm_does_not_do_is_refused_before_anything_is_loaded(
    random_policy, tmp_path, capsys, monkeypatch, options, said
):
    monkeypatch.setenv("QUARTET_VLLM_PYTHON", "nowhere/python")
    random_policy(3).save(tmp_path / "micro")
    assert main(["serve", str(tmp_path / "micro"), "--backend", "vllm", "--port", "0", *options])
    error = capsys.readouterr().err
    assert re.search(said, error), error

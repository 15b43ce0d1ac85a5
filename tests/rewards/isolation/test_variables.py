"""Reward workers get few environment variables: no token or key of the training process, unless it is asked for."""

import json

import pytest

from grpo.cli.parse import main
from grpo.config.run import TrainConfig
from grpo.run.resume import refuse_changed_config
from rewards import RewardError, RewardSpec, Scorer
from rewards.config.options import dump_yaml, load
from rewards.isolation.variables import worker_variables

SECRETS = {
    "OPENAI_API_KEY": "sk-1",
    "HF_TOKEN": "hf_1",
    "HUGGING_FACE_HUB_TOKEN": "hf_2",
    "HF_TOKEN_PATH": "/somewhere",
    "WANDB_API_KEY": "w",
    "AWS_SECRET_ACCESS_KEY": "a",
    "AWS_SESSION_TOKEN": "b",
    "GITHUB_TOKEN": "g",
    "SSH_AUTH_SOCK": "/s",
    "RAY_AUTH_TOKEN": "r",
    "PYTHON_KEYRING_PASSWORD": "p",
    "PGPASSWORD": "p",
    "HTTPS_PROXY": "http://user:word@proxy",
    "LANGSMITH_API_KEY": "l",
    "MY_VARIABLE": "m",
}
NEEDED = {
    "OMP_NUM_THREADS": "1",
    "LC_ALL": "C.UTF-8",
    "TMPDIR": "/tmp",
    "HF_HOME": "/cache",
    "HF_HUB_OFFLINE": "1",
    "VIRTUAL_ENV": "/venv",
    "PYTHONUTF8": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
    "http_proxy": "http://proxy",
}


@pytest.fixture
def environment(monkeypatch):
    for name, value in (SECRETS | NEEDED).items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def tells(tmp_path) -> RewardSpec:
    """A reward that logs the environment of its process."""
    file = tmp_path / "tells.py"
    file.write_text(
        "import json, os\n"
        "def grade(completions, log_extra, **_):\n"
        "    log_extra('environment', [json.dumps(dict(os.environ))] * len(completions))\n"
        "    return [1.0] * len(completions)\n"
    )
    return RewardSpec(f"{file}:grade")


def seen_by(spec: RewardSpec, **options) -> dict[str, str]:
    with Scorer([spec], **options) as scorer:
        [score] = scorer.score(["p"], [["c"]], [{}], prompt_ids=["a"])
    return json.loads(score.extras["environment"][0])


def test_a_worker_sees_what_programs_need_and_no_secret_that_is_not_listed(environment, tells):
    seen = seen_by(tells)
    assert not SECRETS.keys() & seen.keys()
    assert {name: seen.get(name) for name in NEEDED} == NEEDED
    assert {"PATH", "HOME"} <= seen.keys()
    seen = seen_by(tells, pass_variables=["OPENAI_API_KEY"])
    assert seen["OPENAI_API_KEY"] == "sk-1"
    assert SECRETS.keys() & seen.keys() == {"OPENAI_API_KEY"}
    arguments = {"url": "ftp://x", "token_variable": "GITHUB_TOKEN"}  # which `remote` is told to use
    with Scorer([RewardSpec("remote", arguments=arguments)]) as scorer:
        assert scorer._pool._pass_variables == ["GITHUB_TOKEN"]


def test_a_replaced_worker_gets_the_same(environment, tmp_path):
    file = tmp_path / "dies.py"
    file.write_text(
        "import os\n"
        "def grade(completions, **_):\n"
        "    if 'die' in completions: os._exit(1)\n"
        "    return [float(os.environ['MY_VARIABLE'] == 'm' and 'HF_TOKEN' not in os.environ)]\n"
    )
    with Scorer([RewardSpec(f"{file}:grade")], pass_variables=["MY_VARIABLE"], on_error="drop_sample") as scorer:
        for completion in ("c", "die", "c"):
            [score] = scorer.score(["p"], [[completion]], [{}], prompt_ids=["a"])
            assert score.rewards == [None if completion == "die" else 1.0]


def test_variables_that_are_not_there_or_not_withheld(environment, tmp_path, monkeypatch):
    file = tmp_path / "fails.py"
    file.write_text("def grade(completions, **_):\n    raise ValueError('no PATH, no SUCH_VARIABLE')\n")
    with pytest.raises(RewardError) as end, Scorer([RewardSpec(f"{file}:grade")]) as scorer:
        scorer.score(["p"], [["c"]], [{}], prompt_ids=["a"])
    assert "pass_variables" not in str(end.value)
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(RewardError, match="reward.pass_variables: 'OPENAI_API_KEY' is not set"):
        Scorer([RewardSpec("gsm8k")], pass_variables=["OPENAI_API_KEY"])
    assert "OPENAI_API_KEY" not in worker_variables()


@pytest.mark.parametrize("when", ["loading", "scoring"])
def test_a_reward_that_misses_its_key_is_told_how_to_get_it(environment, tmp_path, when):
    file = tmp_path / "asks.py"
    top, inside = ("KEY = os.environ['OPENAI_API_KEY']", "KEY") if when == "loading" else ("", "key()")
    file.write_text(
        f"import os\n{top}\n"
        "def key():\n    return os.environ['OPENAI_API_KEY']\n"
        f"def grade(completions, **_):\n    {inside}\n    return [1.0]\n"
    )
    spec = RewardSpec(f"{file}:grade")
    with pytest.raises(RewardError, match=r"reward.pass_variables: \[OPENAI_API_KEY\]"), Scorer([spec]) as scorer:
        scorer.score(["p"], [["c"]], [{}], prompt_ids=["a"])
    with Scorer([spec], pass_variables=["OPENAI_API_KEY"]) as scorer:
        assert scorer.score(["p"], [["c"]], [{}], prompt_ids=["a"])[0].rewards == [1.0]


def test_the_commands_take_the_list(environment, tmp_path, capsys):
    file = tmp_path / "asks.py"
    file.write_text(
        "import os\n"
        "def grade(prompts, completions, answer, **_):\n"
        "    assert os.environ['OPENAI_API_KEY'] == 'sk-1'\n"
        "    return [float(c.rstrip().split()[-1:] == a.split()[-1:]) for c, a in zip(completions, answer)]\n"
    )
    words = ["reward", "test", f"{file}:grade", "--data.limit", "3"]
    assert main(words) == 1
    assert "reward.pass_variables" in capsys.readouterr().err
    main([*words, "--reward.pass_variables", "[OPENAI_API_KEY]"])
    assert "OPENAI_API_KEY" not in capsys.readouterr().err
    words = ["train", "--model", "tiny", "--output_dir", str(tmp_path / "r"), "--dry_run", "--data.limit", "200"]
    words += ["--rewards", f"[{{function: '{file}:grade'}}]"]
    assert main(words) == 1
    assert "reward.pass_variables: [OPENAI_API_KEY]" in capsys.readouterr().err
    assert main([*words, "--reward.pass_variables", "[OPENAI_API_KEY]"]) == 0


def test_a_run_from_before_the_option_resumes(tmp_path):
    config = load(TrainConfig, None, {"output_dir": str(tmp_path)})
    (tmp_path / "config.yaml").write_text(dump_yaml(config).replace("  pass_variables: []\n", ""))
    refuse_changed_config(tmp_path / "config.yaml", config)  # raises where the configuration has changed

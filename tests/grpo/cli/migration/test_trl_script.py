"""Scripts for TRL are read in a process of their own, up to their trainer; no model is loaded, nothing is trained."""

import json
import time
from pathlib import Path

import psutil
import pytest

from grpo.cli.migration.trl_script import read_trl_script
from grpo.cli.parse import main
from grpo.config.run import TrainConfig
from review.readers.run_folder import read_metrics
from rewards.config.options import load

NOTE = "open('child', 'w').write(str(os.getpid()))"
FORTY_LINES = Path(__file__).parents[3] / "cases/trl_of_forty_lines.py"


@pytest.fixture(scope="module")
def small(hf_policy, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("small")
    policy = hf_policy("llama")
    policy.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    policy.trunk.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
def test_a_script_of_forty_lines_becomes_a_file_that_trains(copied_scripts, small, tmp_path, monkeypatch, capsys):
    """Two rewards, LoRA and vLLM; what is lost is said."""
    assert len(FORTY_LINES.read_text().splitlines()) in range(35, 56)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QUARTET_VLLM_PYTHON", "none")
    words = ["from-trl", str(FORTY_LINES), "--out", "run.yaml"]
    assert main([*words, f"--arguments={small} out", "--json", "m.json"]) == 0
    printed = capsys.readouterr().out
    lost = {each["option"]: each["changes_training"] for each in json.loads(Path("m.json").read_text())["unsupported"]}
    assert lost == {
        **{"lora_dropout": True, "top_p": True, "max_prompt_length": True},
        **{"use_vllm": False, "logging_steps": False},
    }
    for name in lost:
        assert f"- {name}=" in printed
        assert f"# - {name}=" in Path("run.yaml").read_text()
    config = load(TrainConfig, Path("run.yaml"), {})
    assert (config.prompts_per_step, config.rollout.group_size, config.steps) == (2, 4, 2)
    assert (config.lora.rank, config.lora.targets) == (4, ["q_proj", "v_proj"])
    assert [reward.weight for reward in config.rewards] == [1.0, 0.5]
    assert config.loss.importance_correction == "sequence_mask"
    assert main(["train", "run.yaml", "--threads", "1"]) == 0
    metrics = read_metrics(tmp_path / "out")
    assert [line["step"] for line in metrics if "reward/mean" in line] == [1, 2]
    assert main(words) == 2  # it overwrites nothing


GUARDED = '''
from dataclasses import dataclass, field
from functools import partial
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, TrlParser
from trl.rewards import think_format_reward

@dataclass
class Own:
    rows: int = field(default=4)

class Mine(GRPOTrainer):
    def log(self, *a): ...

class Stop(TrainerCallback): ...

class Room:
    def reset(self, **_): ...
    def look(self) -> str:
        """Looks."""

def weather(town: str) -> str:
    """Tells the weather."""

def close_to(completions, goal, **_):
    return [float(goal) for _ in completions]

def made(power):
    def inner(completions, **_): ...
    return inner

if __name__ == "__main__":
    own, args = TrlParser((Own, GRPOConfig)).parse_args_and_config()
    args.learning_rate *= 2
    model = AutoModelForCausalLM.from_pretrained(
        pretrained_model_name_or_path="nobody/nothing", dtype="bfloat16", revision="v2", device_map="auto"
    )
    model.resize_token_embeddings(64)
    model = get_peft_model(model.to("cuda"), LoraConfig(r=2, target_modules="all-linear", use_dora=True))
    rows = [{"prompt": f"{i}?", "note": None} for i in range(own.rows)]
    try:
        trainer = Mine(
            model,
            reward_funcs=[partial(close_to, goal=3), think_format_reward, made(2), "nobody/reward"],
            args=args, callbacks=[Stop()], tools=[weather], environment_factory=Room,
            train_dataset=Dataset.from_list(rows), eval_dataset=Dataset.from_list(rows[:2]),
        )
        trainer.train()
    finally:
        open("went_on", "w").close()
'''


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["0", "-1"])
def test_processes_are_one_or_more(tmp_path, capsys, processes):
    (tmp_path / "train.py").write_text("")
    words = ["from-trl", str(tmp_path / "train.py"), f"--processes={processes}", "--out", str(tmp_path / "run.yaml")]
    assert main(words) == 1
    assert f"--processes={processes}: give 1 or more" in capsys.readouterr().err


def test_what_a_script_may_do_before_its_trainer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "train.py"
    script.write_text(GUARDED)
    words = (
        "--output_dir out --bf16 true --learning_rate 1e-5 --num_train_epochs 1 --eval_strategy steps --eval_steps 3"
    )
    migration = read_trl_script(script, tmp_path / "data", [*words.split(), "--rows", "16"], processes=2)
    assert not (tmp_path / "went_on").exists()
    assert not any("refuses" in note for note in migration.notes)
    config = TrainConfig(**migration.tree)
    assert (config.model, config.dtype) == ("nobody/nothing@v2", "bfloat16")
    assert (config.lora.rank, config.lora.alpha, config.lora.targets) == (2, 8, None)
    assert config.learner.learning_rate == 2e-5
    assert (config.prompts_per_step, config.steps, config.max_turns) == (2, 8, 512)  # turns have no limit there
    assert (config.eval.limit, config.eval.every, config.eval.samples) == (2, 3, 8)
    assert config.data[0].template == "{prompt}"
    assert json.loads((tmp_path / "data/train.jsonl").read_text().splitlines()[0]) == {
        "prompt": "0?",
        "note": None,
        "gold_text": "",
    }
    assert config.data[0].solution_column is None
    first, second, model = config.rewards
    assert (first.function, first.arguments) == ("train.py:close_to", {"goal": 3})
    assert second.function == "trl.rewards.format_rewards:think_format_reward"
    assert (model.function, model.name) == ("model:nobody/reward", "reward_model_3")
    assert (config.tools, config.environment) == (["train.py:weather"], "train.py:Room")
    lost = {each.option for each in migration.unsupported}
    assert lost == {"use_dora", "device_map", "reward_funcs", "callbacks", "GRPOTrainer"}


AFTERWARDS = """
import inspect
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer
options = {"temperature": 0.7, "output_dir": "out", "junk": 1}
known = inspect.signature(GRPOConfig.__init__).parameters
kwargs = {"model_init_kwargs": '{"dtype": "bfloat16"}', "chat_template_kwargs": '{"enable_thinking": false}'}
args = GRPOConfig(max_steps=3, **kwargs, **{name: value for name, value in options.items() if name in known})
rows = Dataset.from_list([{"prompt": "1?"}])
trainer = GRPOTrainer("nobody/nothing", reward_funcs=(len,), args=args, train_dataset=rows)
trainer.epsilon_low = 0.1
trainer.model.print_trainable_parameters()
trainer.train()
open("went_on", "w").close()
"""


@pytest.mark.slow
def test_what_a_script_sets_on_its_trainer_is_said(copied_scripts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "train.py"
    script.write_text(AFTERWARDS)
    migration = read_trl_script(script, tmp_path / "data")
    assert not (tmp_path / "went_on").exists()
    assert migration.options["rollout"]["temperature"] == 0.7
    assert migration.options["dtype"] == "bfloat16"  # TRL reads JSON, as a command line gives it
    assert migration.options["data"]["chat_template_kwargs"] == {"enable_thinking": False}
    lost = {each.option: each.value for each in migration.unsupported}
    assert lost == {"trainer": "epsilon_low = 0.1", "reward_funcs": "len"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "timeout_s", "message"),
    [
        ("print('nothing here')", 600, "ended without one .exit code 0.. It printed last:\nnothing here"),
        ("import trl\nraise RuntimeError('no such thing')", 600, "exit code 1.*\n.*RuntimeError: no such thing"),
        pytest.param(
            f"import os, time\nif os.fork() == 0: {NOTE}\ntime.sleep(999)", 40, "after 40 s", marks=pytest.mark.long
        ),
    ],
)
def test_a_script_without_a_trainer_is_refused_with_its_last_words(
    copied_scripts, tmp_path, monkeypatch, text, timeout_s, message
):
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "train.py"
    script.write_text(text)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        read_trl_script(script, tmp_path / "data", timeout_s=timeout_s)
    if (child := tmp_path / "child").exists():
        time.sleep(0.5)
        number = int(child.read_text())
        assert not psutil.pid_exists(number) or psutil.Process(number).status() == psutil.STATUS_ZOMBIE


def test_a_script_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no script"):
        read_trl_script(tmp_path / "none.py", tmp_path)

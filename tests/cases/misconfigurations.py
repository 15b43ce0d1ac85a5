"""25 misconfigurations from public issues, as our YAML, as scripts for TRL and as command lines of verl.

`write` makes the files of one beside a model of two layers: data, rewards, tools, a configuration. A good report names
the option or the fact (`says`, a regular expression).
"""

import importlib.util
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# As Qwen3's: thoughts of the turns before the last question are left out when the history is rendered again.
FORGETFUL = (
    "{% for message in messages %}{% set content = message['content'] or '' %}"
    "{% if message['role'] == 'assistant' and not loop.last and '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + content }}"
    "{% for call in message['tool_calls'] or [] %}"
    "{{ '<tool_call>\\n' + (call['function'] | tojson) + '\\n</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
)
REWARDS = '''"""Rewards of the cases."""
import functools
import re
import time


def number(text):
    found = re.findall(r"-?\\d+", text)
    return found[-1] if found else None


def exact(completions, answer, **kwargs):
    return [float(number(text) is not None and number(text) == number(gold)) for text, gold in zip(completions, answer)]


def against_solutions(completions, solutions, **kwargs):
    return [float(number(text) == number(gold)) for text, gold in zip(completions, solutions)]


def tower(completions, answer, **kwargs):
    if any("^" in text for text in completions):
        time.sleep(3600)  # as a power tower does in a symbolic checker
    return exact(completions, answer)


def one_for_all(completions, **kwargs):
    return [1.0]


def boxed(completions, answer, **kwargs):
    found = [re.search(r"boxed{(.*?)}", text) for text in completions]
    golds = [re.search(r"boxed{(.*?)}", text) for text in answer]
    return [float(bool(one and gold and one[1] == gold[1])) for one, gold in zip(found, golds)]


def tagged(completions, **kwargs):
    pattern = re.compile(r"^<think>.*?</think><answer>.*?</answer>$")
    return [float(bool(pattern.match(text))) for text in completions]


def of_messages(completions, answer, **kwargs):
    return [float(number(one[0]["content"]) == number(gold)) for one, gold in zip(completions, answer)]


def contained(completions, answer, **kwargs):
    said = [text.split("####")[-1].strip() for text in completions]
    return [float(one in gold or gold in one) for one, gold in zip(said, answer)]


def distance(completions, answer, **kwargs):
    pairs = zip(completions, answer)
    return [min(1.0, abs(int(number(text) or 0) - int(number(gold))) / 10) for text, gold in pairs]


def of_texts(function):
    """TRL hands over messages where its prompts are messages."""

    @functools.wraps(function)
    def reward(completions, *more, **columns):
        texts = [one if isinstance(one, str) else one[-1]["content"] for one in completions]
        return function(texts, *more, **columns)

    return reward


exact, against_solutions, tower, one_for_all, boxed, tagged, contained, distance = map(
    of_texts, (exact, against_solutions, tower, one_for_all, boxed, tagged, contained, distance)
)
'''
VERL_REWARDS = '''"""The same rewards as verl calls them."""
import task_rewards

CHOSEN = "{reward}"


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return getattr(task_rewards, CHOSEN)([solution_str], answer=[ground_truth])[0]
'''
TOOLS = '''"""Tools of the cases."""


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: the first number
        b: the second number
    """
    return a + b


def look_up(name: str) -> str:
    """Look up a number by its name.

    Args:
        name: what the number is called
    """
    return {"settings": {}}[name]["value"]
'''
SCRIPT = """from datasets import load_dataset
from peft import LoraConfig
from task_rewards import {reward}
from trl import GRPOConfig, GRPOTrainer


def with_prompt(row):
    return {{"prompt": {prompt}}}


dataset = load_dataset("json", data_files="data/train.jsonl", split="train").map(with_prompt)
arguments = GRPOConfig(
    output_dir="run",
    use_cpu=True,
    bf16=False,
    report_to="none",
    max_steps=20,
{arguments}
)
trainer = GRPOTrainer(
    model="model",
    reward_funcs={reward},
    args=arguments,
    train_dataset=dataset,
{trainer}
)
trainer.train()
"""
VERL = {
    "algorithm.adv_estimator": "grpo",
    "data.train_files": "verl_data/train.parquet",
    "data.val_files": "verl_data/test.parquet",
    "data.train_batch_size": 4,
    "data.max_prompt_length": 128,
    "data.max_response_length": 64,
    "actor_rollout_ref.model.path": "model",
    "actor_rollout_ref.actor.optim.lr": "1e-6",
    "actor_rollout_ref.rollout.name": "vllm",
    "actor_rollout_ref.rollout.n": 4,
    "custom_reward_function.path": "verl_rewards.py",
    "trainer.n_gpus_per_node": 1,
    "trainer.total_training_steps": 20,
}
INSTRUCTION = "Let's think step by step and put the final answer after ####."


@dataclass(frozen=True)
class Misconfiguration:
    """One mistake: where it was reported, how it is written, and what a good report must say.

    Attributes:
        issue: the public report
        says: a regular expression of the option or fact that must be named
        options: changes of the sound configuration (dotted keys), or None where ours cannot express the mistake
        trl: changes of GRPOConfig's arguments, or None where a script cannot express it
        verl: changes of the command line, or None
        reward: the function of `REWARDS`
        rows: changes of the rows of the data, by number
        number: how many rows the training data has
        model: changes of the model's folder (see `write_model`)
        trainer: further arguments of GRPOTrainer, as source
    """

    issue: str
    says: str
    options: dict[str, Any] | None = field(default_factory=dict)
    trl: dict[str, Any] | None = field(default_factory=dict)
    verl: dict[str, Any] | None = None
    reward: str = "exact"
    rows: dict[int, dict[str, str]] = field(default_factory=dict)
    number: int = 24
    model: dict[str, Any] = field(default_factory=dict)
    trainer: str = ""
    chat: bool = True
    shared_rows: int = 0  # rows of the evaluation that are rows of training
    suffix: str = ""  # what every question ends with


LARGE = {"hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80, "num_attention_heads": 64}
LARGE |= {"num_key_value_heads": 8, "vocab_size": 151936, "weights": False}
GITHUB = "https://github.com/"
CASES = {
    "missing_column": Misconfiguration(
        f"{GITHUB}huggingface/open-r1/issues/384", r"\bsolutions\b", reward="against_solutions"
    ),
    "limit_cuts_all": Misconfiguration(
        f"{GITHUB}huggingface/trl/pull/5759",
        r"max_completion_(tokens|length)|max_response_length",
        {"rollout.max_completion_tokens": 4},
        {"max_completion_length": 4},
        {"data.max_response_length": 4},
    ),
    "group_not_dividing": Misconfiguration(
        f"{GITHUB}huggingface/open-r1/issues/249",
        r"num_generations|divisible|group_size",
        None,
        {"per_device_train_batch_size": 7, "num_generations": 8},
    ),
    "group_of_one": Misconfiguration(
        f"{GITHUB}modelscope/ms-swift/issues/3980",
        r"group_size|generations per prompt|rollout\.n\b",
        {"rollout.group_size": 1},
        {"num_generations": 1},
        {"actor_rollout_ref.rollout.n": 1},
    ),
    "reward_hangs": Misconfiguration(
        f"{GITHUB}huggingface/Math-Verify/issues/65",
        r"(?i)hang|timed? ?out|did not (return|answer|end)|timeout_s",
        reward="tower",
        rows={3: {"answer": "It is a tower of powers. #### 5^(5^(5^(5^5)))"}},
        verl={},
    ),
    "wrong_number_of_rewards": Misconfiguration(
        f"{GITHUB}huggingface/trl/issues/6533",
        r"(?i)one_for_all.*(1 (reward|value|number)|number of|values? for|length)|(returned|gave|gives) 1\b",
        reward="one_for_all",
    ),
    "gold_does_not_score": Misconfiguration(
        f"{GITHUB}huggingface/open-r1/issues/503", r"(?i)\bgold\b", reward="boxed", verl={}
    ),
    "format_never_matches": Misconfiguration(
        f"{GITHUB}huggingface/open-r1/issues/235",
        r"(?i)\btied\b|always|same (reward|score|value)|never|constant|\bgold\b",
        reward="tagged",
        verl={},
    ),
    "text_read_as_chat": Misconfiguration(
        f"{GITHUB}unslothai/unsloth/issues/2907",
        r"(?i)string indices|TypeError|chat:|messages",
        {"data.template": "{question}\n"},
        reward="of_messages",
        chat=False,
    ),
    "no_chat_template": Misconfiguration(
        f"{GITHUB}huggingface/open-r1/issues/85",
        r"(?i)chat.?template|template: chat",
        model={"template": None},
        verl={},
    ),
    "double_bos": Misconfiguration(
        f"{GITHUB}deepseek-ai/DeepSeek-R1/issues/151 · {GITHUB}NVIDIA-NeMo/RL/issues/855",
        r"(?i)\bbos\b|begin.of.(text|sequence)|twice|two start|<\|endoftext\|>.*<\|endoftext\|>",
        model={"template": "{{ bos_token }}" + CHATML, "adds_bos": True},
    ),
    "stop_token_missing": Misconfiguration(
        f"{GITHUB}huggingface/trl/pull/7039",
        r"(?i)\bstop|\beos\b|<\|im_end\|>",
        model={"eos": "<|endoftext|>"},
    ),
    "thoughts_dropped": Misconfiguration(
        f"{GITHUB}verl-project/verl/issues/6854",
        r"(?i)thought|think|reasoning",
        {"tools": ["tools.py:add"]},
        None,
        model={"template": FORGETFUL},
    ),
    "prompt_longer_than_context": Misconfiguration(
        f"{GITHUB}huggingface/trl/issues/3569",
        r"(?i)context|max_position_embeddings|max_model_len|max_prompt_length",
        rows={5: {"question": "Add these: " + " + ".join(str(number) for number in range(300)) + "?"}},
        verl={},
    ),
    "learning_rate_of_sft": Misconfiguration(
        f"{GITHUB}jjyaoao/HelloAgents/issues/107",
        r"learning_rate|optim\.lr",
        {"learner.learning_rate": 5e-4},
        {"learning_rate": 5e-4},
        {"actor_rollout_ref.actor.optim.lr": "5e-4"},
    ),
    "lora_misses_modules": Misconfiguration(
        f"{GITHUB}dllm-reasoning/d1/issues/6",
        r"attn_out|ff_proj",
        {"lora.targets": ["q_proj", "k_proj", "v_proj", "attn_out", "ff_proj"]},
        trainer='    peft_config=LoraConfig(target_modules=["q_proj", "k_proj", "v_proj", "attn_out", "ff_proj"]),',
    ),
    "lora_reaches_nothing": Misconfiguration(
        f"{GITHUB}hiyouga/LlamaFactory/issues/209",
        r"query_key_value",
        {"lora.targets": ["query_key_value"]},
        trainer='    peft_config=LoraConfig(target_modules=["query_key_value"]),',
    ),
    "disk_too_small": Misconfiguration(
        f"{GITHUB}Agent-RL/ReCall/issues/61 · {GITHUB}PrimeIntellect-ai/prime-rl/pull/1464",
        r"(?i)\b(disk|space)\b.*\b(not|no|too|more|exceed|larger|above|full|short)",
        {"checkpoint.every": 1, "checkpoint.keep": None},
        None,  # TRL wants the weights, which are not here
        {"trainer.save_freq": 1},
        model=LARGE,
    ),
    "empty_answer_rewarded": Misconfiguration(
        f"{GITHUB}Liuziyu77/Visual-RFT/issues/176", r"(?i)\bempty\b", reward="contained", verl={}
    ),
    "reward_upside_down": Misconfiguration(
        f"{GITHUB}huggingface/trl/issues/2771", r"(?i)\bgold\b|\bwrong\b|\bsign\b", reward="distance", verl={}
    ),
    "evaluation_in_training": Misconfiguration(
        f"{GITHUB}Open-Source-O1/Open-O1/issues/10",
        r"(?i)held.?out|evaluat|leak|trained on",
        {"eval.limit": 6},
        {"eval_strategy": "steps", "eval_steps": 5},
        {},
        trainer='    eval_dataset=load_dataset("json", data_files="data/test.jsonl", split="train").map(with_prompt),',
        shared_rows=3,
    ),
    "memory_too_small": Misconfiguration(
        f"{GITHUB}huggingface/trl/issues/3678",
        r"(?i)\bmemory\b.*\b(not|no|too|more|exceed|larger|above|short)",
        trl=None,
        verl={},
        model=LARGE,
    ),
    "tool_always_fails": Misconfiguration(
        f"{GITHUB}verl-project/verl/issues/7177",
        r"(?i)look_up",
        {"tools": ["tools.py:look_up"]},
        {"max_tool_calling_iterations": 2},
        model={"shipped_template": "qwen2_5.jinja"},
        trainer="    tools=[__import__('tools').look_up],",
    ),
    "instruction_twice": Misconfiguration(
        f"{GITHUB}RLHFlow/Online-DPO-R1/issues/10",
        r"(?i)twice|duplicat|repeats?\b|same (sentence|instruction|text)",
        {"data.template": {"system": INSTRUCTION}},
        None,
        suffix=f" {INSTRUCTION}",
    ),
    "data_smaller_than_a_step": Misconfiguration(
        f"{GITHUB}meta-pytorch/torchforge/pull/519",
        r"(?i)prompts_per_step|train_batch_size|fewer|only 3|\b3 (prompts|examples|rows|problems)",
        {"prompts_per_step": 16},
        {"per_device_train_batch_size": 64, "num_generations": 4},
        {"data.train_batch_size": 16},
        number=3,
    ),
}


def problems(case: Misconfiguration, start: int, number: int) -> list[dict[str, str]]:
    """Additions with worked solutions of some thirty tokens."""
    rows = []
    for index in range(start, start + number):
        a, b = 11 + 7 * index % 83, 5 + 3 * index % 61
        question = f"A box holds {a} red and {b} blue balls. How many balls are in it?{case.suffix}"
        answer = f"There are {a} red balls and {b} blue ones. Together that makes {a} + {b} balls. #### {a + b}"
        rows.append({"question": question, "answer": answer})
    return rows


def write_data(case: Misconfiguration, folder: Path) -> None:
    """Write both splits as JSONL, and as verl's parquet."""
    import pandas

    train = problems(case, 0, case.number)
    for number, change in case.rows.items():
        train[number] |= change
    test = train[: case.shared_rows] + problems(case, 100, 8)
    verl_folder = folder.with_name("verl_data")
    folder.mkdir()
    verl_folder.mkdir()
    for name, rows in (("train", train), ("test", test)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        records = [
            {
                "data_source": "boxes",
                "prompt": [{"role": "user", "content": row["question"]}],
                "reward_model": {"style": "rule", "ground_truth": row["answer"]},
                "extra_info": {"split": name, "index": index},
            }
            for index, row in enumerate(rows)
        ]
        pandas.DataFrame(records).to_parquet(verl_folder / f"{name}.parquet")


def write_model(folder: Path, changes: dict[str, Any]) -> None:
    """Write a Qwen2 of two layers and its tokenizer; `weights: False` writes the shape alone.

    `template`, `shipped_template` (a file that the installed TRL ships), `eos` and `adds_bos` change the tokenizer, all
    other keys the shape.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    rows = problems(CASES["missing_column"], 0, 24)
    words.train_from_iterator([text for row in rows for text in row.values()], trainer)
    if changes.get("adds_bos"):
        words.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
    template = changes.get("template", CHATML)
    if "shipped_template" in changes:
        package = importlib.util.find_spec("trl")
        assert package is not None
        template = (
            Path(package.origin or "").with_name("chat_templates").joinpath(changes["shipped_template"]).read_text()
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<|endoftext|>",
        eos_token=changes.get("eos", "<|im_end|>"),
        pad_token="<|endoftext|>",
        chat_template=template,
    )
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "vocab_size": len(words.get_vocab()), "max_position_embeddings": 256}
    ids = {"bos_token_id": 0, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    config = Qwen2Config(**shape | ids | {key: value for key, value in changes.items() if key in shape})
    tokenizer.save_pretrained(folder)
    if changes.get("weights", True):
        torch.manual_seed(0)
        Qwen2ForCausalLM(config).save_pretrained(folder)
    else:
        config.architectures = ["Qwen2ForCausalLM"]
        config.save_pretrained(folder)


def configuration(case: Misconfiguration) -> dict[str, Any]:
    """The sound configuration with the changes of a case."""
    options: dict[str, Any] = {
        "model": "model",
        "output_dir": "run",
        "device": "cpu",
        "data": {"name": "data", "template": "chat"},
        "steps": 20,
        "prompts_per_step": 4,
        "rollout": {"group_size": 4, "max_completion_tokens": 64},
        "rewards": [{"function": f"task_rewards.py:{case.reward}"}],
        "learner": {"learning_rate": 1e-6},
        "log": {"trackers": []},
    }
    for key, value in (case.options or {}).items():
        section, _, name = key.rpartition(".")
        (options.setdefault(section, {}) if section else options)[name] = value
    return options


def script(case: Misconfiguration) -> str:
    """The case as a script that trains with TRL."""
    chosen = {
        "learning_rate": 1e-6,
        "per_device_train_batch_size": 16,
        "num_generations": 4,
        "max_completion_length": 64,
    } | (case.trl or {})
    prompt = '[{"role": "user", "content": row["question"]}]' if case.chat else 'row["question"]'
    lines = "\n".join(f"    {name}={value!r}," for name, value in chosen.items())
    text = SCRIPT.format(reward=case.reward, prompt=prompt, arguments=lines, trainer=case.trainer)
    text = text.replace(",\n\n)", ",\n)")
    return text if "LoraConfig(" in text else text.replace("from peft import LoraConfig\n", "")


def command(case: Misconfiguration) -> str:
    """The case as a command line of verl."""
    chosen = VERL | (case.verl or {})
    return "python3 -m verl.trainer.main_ppo " + " ".join(f"{name}={value}" for name, value in chosen.items()) + "\n"


def write(name: str, folder: Path) -> dict[str, Path]:
    """Write the files of a case (`sound` is without a mistake), and return those that can be given to a tool."""
    case = CASES[name] if name != "sound" else Misconfiguration("", "", verl={})
    folder.mkdir(parents=True)
    write_data(case, folder / "data")
    write_model(folder / "model", case.model)
    (folder / "task_rewards.py").write_text(REWARDS)
    (folder / "verl_rewards.py").write_text(VERL_REWARDS.replace("{reward}", case.reward))
    (folder / "tools.py").write_text(TOOLS)
    forms = {}
    if case.options is not None:
        forms["yaml"] = folder / "config.yaml"
        forms["yaml"].write_text(yaml.safe_dump(configuration(case), sort_keys=False))
    if case.trl is not None:
        forms["trl"] = folder / "train.py"
        forms["trl"].write_text(script(case))
    if case.verl is not None:
        forms["verl"] = folder / "train.sh"
        forms["verl"].write_text(command(case))
    return forms


def named(case: Misconfiguration, code: int, said: str) -> str | None:
    """The line of a report that names the mistake: any line of a refusal, else one that warns."""
    lines = [line.strip() for line in said.splitlines() if code or re.search(r"(?i)warn", line)]
    return next((line for line in reversed(lines) if re.search(case.says, line)), None)

"""One file with an environment, in TRL's GRPOTrainer and in a run of ours, with one model that has learned to call."""

from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from incrementing import IncrementEnv
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from grpo.train import train
from policies.presets import small_tokenizer
from review.readers.run_folder import read_metrics
from rewards.records import read_rollouts
from rollout.environments.format import Call, Turn, TurnFormat

CASE = f"{Path(__file__).parents[1] / 'cases/incrementing.py'}:IncrementEnv"
TEMPLATE = Path(trl.__file__).parent / "chat_templates/qwen2_5.jinja"
QUESTIONS = ["Count.", "Count on.", "Go on.", "Count again.", "Start."]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::RuntimeWarning"),
]


def asked(question: str) -> list[dict]:
    return [{"role": "user", "content": question + f" Reach {len(question) % 5}."}]  # as `reset` does


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny Qwen2 with Qwen's own template. It has learned to increment by 2 or 3, to read, and to say what it did."""
    environment = IncrementEnv()
    corpus = [TEMPLATE.read_text(), *(" ".join(m["content"] for m in asked(q)) for q in QUESTIONS)] * 3
    tokenizer = small_tokenizer(corpus, 1024)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = TEMPLATE.read_text()
    config = Qwen2Config(
        vocab_size=len(tokenizer) + 8,  # Qwen's class may add tokens of its own
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    folder = tmp_path_factory.mktemp("model")
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(
        folder
    )  # the class that both trainers read: Qwen's splits words its own way
    form = TurnFormat(tokenizer, [environment.increment, environment.read])
    rows = []
    for question in QUESTIONS:
        for step in (2, 3):
            ids = form.tools_prompt(asked(question))
            turns = [("increment", {"step": step}, str(step)), ("read", {}, f"The counter is {step}.")]
            labels = [-100] * len(ids)
            for name, arguments, result in turns:
                turn, written = form.write(Turn("", (Call(name, arguments),))), form.reply([(name, result)])
                ids, labels = ids + turn + written, labels + turn + [-100] * len(written)
            last = form.write(Turn("Done."))
            rows.append((ids + last, labels + last))
    torch.manual_seed(0)
    torch.set_num_threads(1)
    learned = Qwen2ForCausalLM(config)
    optimizer = torch.optim.AdamW(learned.parameters(), lr=5e-3)
    length = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [tokenizer.pad_token_id] * (length - len(ids)) for ids, _ in rows])
    labels = torch.tensor([labels + [-100] * (length - len(labels)) for _, labels in rows])
    for step in range(250):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / 250)
        loss = learned(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.03  # about a token in fifty is its own choice, 2 or 3: .02 nats
    learned.save_pretrained(folder)
    return folder


def well_done(messages: list[dict]) -> bool:
    """Increment, read, done: what both trainers are told the model did."""
    if [message["role"] for message in messages] != ["assistant", "tool", "assistant", "tool", "assistant"]:
        return False
    [first], [second] = messages[0]["tool_calls"], messages[2]["tool_calls"]
    step = first["function"]["arguments"]["step"]
    told = [(message["name"], message["content"]) for message in messages if message["role"] == "tool"]
    return second["function"]["name"] == "read" and told == [
        ("increment", str(step)),
        ("read", f"The counter is {step}."),
    ]


def test_a_class_of_trl_runs_unchanged_in_both(model, micro_config, tmp_path):
    episodes, rewards = [], []

    def watch(completions, environments, **_):
        episodes.extend(completions)
        rewards.extend(environment.get_reward() for environment in environments)
        return [float(len(completion)) for completion in completions]

    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model),
        processing_class=AutoTokenizer.from_pretrained(model),
        reward_funcs=watch,
        train_dataset=Dataset.from_list(
            [{"prompt": [{"role": "user", "content": q}], "question": q} for q in QUESTIONS]
        ),
        environment_factory=IncrementEnv,
        args=GRPOConfig(
            str(tmp_path / "trl"),
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=200,
            max_steps=2,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        ),
    )
    trainer.train()
    assert sum(map(well_done, episodes)) > len(episodes) / 2 == 8
    assert trainer.state.log_history[0]["tools/call_frequency"] > 1
    assert 0 < sum(rewards) < 16

    data = tmp_path / "data.jsonl"
    data.write_text("".join(f'{{"question": "{question}", "answer": "#### 1"}}\n' for question in QUESTIONS))
    options = {
        "model": str(model),
        "environment": CASE,
        "data.name": str(data),
        "data.limit": None,
        "data.template": "chat",
        "rollout.max_completion_tokens": 200,
        "rollout.draft_tokens": None,
        "mtp.depth": 4,
        "mtp.every": 1,
        "sft.steps": 0,
        "steps": 1,
        "learner.learning_rate": 1e-4,
    }
    train(micro_config(tmp_path / "ours", **options))
    lines = read_rollouts(tmp_path / "ours", 1)
    assert sum(well_done(line["turns"]) for line in lines) > len(lines) / 2 == 8
    assert read_metrics(tmp_path / "ours")[0]["tools/turns_mean"] > 2
    for line in lines:
        told = [turn["content"] for turn in line["turns"] if turn["role"] == "tool" and turn["name"] == "increment"]
        reached = int(told[-1]) if told else 0
        assert line["parts"]["environment"] == float(
            reached == len(line["messages"][0]["content"].split(" Reach")[0]) % 5
        )

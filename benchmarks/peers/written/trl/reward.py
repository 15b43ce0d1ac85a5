"""A reward of one's own for TRL's GRPOTrainer: is the answer in the text, and is the text short?"""

from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer


def right_and_short(completions, answer, **columns):
    pairs = zip(completions, answer, strict=True)
    return [float(gold in chat[0]["content"]) - 0.001 * len(chat[0]["content"]) for chat, gold in pairs]


def as_chat(row):
    return {"prompt": [{"role": "user", "content": row["question"]}]}


trainer = GRPOTrainer(
    model="model",
    reward_funcs=right_and_short,
    args=GRPOConfig(
        output_dir="out",
        max_steps=2,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=16,
        save_steps=1,
        report_to="none",
        bf16=False,
    ),
    train_dataset=load_dataset("json", data_files="data.jsonl", split="train").map(as_chat),
)
trainer.train()

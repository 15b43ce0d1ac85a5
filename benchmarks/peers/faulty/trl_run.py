"""A run of TRL as its documentation shows it: python trl_run.py '{"learning_rate": 1e-5}' [REWARD] [MODEL] [resume]"""

import json
import sys

import marks
from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer


def as_chat(row):
    return {"prompt": [{"role": "user", "content": row["question"]}]}


options = {
    "output_dir": "out",
    "max_steps": 8,
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": 8,
    "save_steps": 3,
    "logging_steps": 1,
    "learning_rate": 1e-4,
    "report_to": "none",
    "bf16": False,
}
given, reward, model, resume = (*sys.argv[1:], *["{}", "reward", "model", ""][len(sys.argv) - 1 :])
trainer = GRPOTrainer(
    model=model,
    reward_funcs=getattr(marks, reward),
    args=GRPOConfig(**options | json.loads(given)),
    train_dataset=load_dataset("json", data_files="data.jsonl", split="train").map(as_chat),
)
trainer.train(resume_from_checkpoint=bool(resume))

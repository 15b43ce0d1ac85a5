"""A loss of one's own for TRL's GRPOTrainer: the ratio, not clipped. No option is for it, so a method is replaced."""

import torch
from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer


def right_and_short(completions, answer, **columns):
    pairs = zip(completions, answer, strict=True)
    return [float(gold in chat[0]["content"]) - 0.001 * len(chat[0]["content"]) for chat, gold in pairs]


def as_chat(row):
    return {"prompt": [{"role": "user", "content": row["question"]}]}


class UnclippedTrainer(GRPOTrainer):
    def _compute_loss(self, model, inputs):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        kept = inputs["completion_ids"].size(1)
        logprobs, *_ = self._get_per_token_logps_and_entropies(model, ids, mask, kept)
        old = inputs.get("old_per_token_logps")
        ratio = torch.exp(logprobs - (logprobs.detach() if old is None else old))
        objective = ratio * inputs["advantages"][:, None] * inputs["completion_mask"]
        return -objective.sum() / inputs["num_items_in_batch"]


trainer = UnclippedTrainer(
    model="model",
    reward_funcs=right_and_short,
    args=GRPOConfig(
        output_dir="out",
        max_steps=2,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=16,
        report_to="none",
        bf16=False,
    ),
    train_dataset=load_dataset("json", data_files="data.jsonl", split="train").map(as_chat),
)
trainer.train()

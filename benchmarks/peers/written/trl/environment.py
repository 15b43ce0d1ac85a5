"""An environment of one's own for TRL's GRPOTrainer: a number is guessed."""

from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer


class HigherLower:
    def reset(self, secret: int, **columns) -> str | None:
        self.secret, self.score = secret, 0.0
        return " The number is from 1 to 9."

    def guess(self, number: int) -> str:
        """Guess the number.

        Args:
            number: The guess, from 1 to 9.

        Returns:
            Whether the number is higher or lower.
        """
        self.score = float(number == self.secret)
        return "higher" if number < self.secret else "lower"

    def get_reward(self) -> float:
        return self.score


def as_chat(row):
    return {"prompt": [{"role": "user", "content": row["question"]}]}


trainer = GRPOTrainer(
    model="model",
    environment_factory=HigherLower,
    args=GRPOConfig(
        output_dir="out",
        max_steps=2,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=32,
        max_tool_calling_iterations=3,
        report_to="none",
        bf16=False,
    ),
    train_dataset=load_dataset("json", data_files="data.jsonl", split="train").map(as_chat),
)
trainer.train()

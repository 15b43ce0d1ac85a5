"""TRL's GRPOTrainer learns, our rollouts sample: a tiny MoE/MLA policy, word problems, less than a minute on a CPU.

    python examples/04_trl_bridge.py

First `quartet sft` gives the policy something to say (kept in runs/trl_bridge), then TRL trains it. The MTP head drafts
for TRL but is not trained by it: TRL's log shows the draft head's age and how many of its drafts are accepted.
"""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from grpo.config.run import SftConfig
from grpo.sft import sft
from grpo.trl_bridge import rollout_func
from policies.policy import Policy
from rewards import load_reward
from rewards.data.word_problems import word_problems

FOLDER = Path("runs/trl_bridge")
STEPS, LEARNER = 150, {"learning_rate": 2e-3, "schedule": "constant"}


def main() -> None:
    if not (FOLDER / "policy").exists():
        data = {"name": "word_problems", "task_options": {"levels": [1]}}
        config = SftConfig(output_dir=FOLDER, data=data, steps=STEPS, learner=LEARNER, log={"trackers": []})
        sft(config, resume="auto")
    policy = Policy.load(FOLDER / "policy")

    problems = word_problems("train", [1], count=1000)
    dataset = Dataset.from_list([{"prompt": f"{p['question']}\n", "answer": p["answer"]} for p in problems])
    rollout = rollout_func(policy, draft_tokens=4, prompts_per_shard=16, warn_every=10)
    trainer = GRPOTrainer(
        model=policy.trunk,
        processing_class=policy.tokenizer,
        reward_funcs=[load_reward("gsm8k")],  # or "path/to/file.py:function"
        rollout_func=rollout,
        args=GRPOConfig(
            str(FOLDER / "trl"),
            max_steps=20,
            per_device_train_batch_size=128,
            num_generations=8,
            max_completion_length=64,
            learning_rate=4e-4,
            bf16=False,
            gradient_checkpointing=False,
            logging_steps=5,
            save_strategy="no",
            report_to=[],
        ),
        train_dataset=dataset,
    )
    trainer.train()
    rollout.close()
    policy.save(FOLDER / "trained")
    for line in trainer.state.log_history:
        if "reward" in line:
            print(
                f"step {line['step']:3d}  reward {line['reward']:.3f}  "
                f"tokens per forward {line['draft/tokens_per_forward']:.2f}  head age {line['draft/mtp_head_age']:.0f}"
            )
    print(f"saved with its MTP head in {FOLDER}/trained: quartet eval {FOLDER}/trained")


if __name__ == "__main__":
    main()

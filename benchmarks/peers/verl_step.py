"""One step of GRPO by verl's documented command, in verl's own environment: does it get anywhere without a GPU?

.peers/verl/bin/python benchmarks/peers/verl_step.py models/smollm2-135m-instruct
"""

from __future__ import annotations

import os
import runpy
import sys
import tempfile
from pathlib import Path


def main() -> None:
    import pandas

    problems = [
        {
            "data_source": "openai/gsm8k",
            "prompt": [{"role": "user", "content": f"What is {i} + 2?"}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(i + 2)},
            "extra_info": {"split": "train", "index": i},
        }
        for i in range(4)
    ]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "train.parquet")
        pandas.DataFrame(problems).to_parquet(data)
        options = {
            "algorithm.adv_estimator": "grpo",
            "data.train_files": data,
            "data.val_files": data,
            "data.train_batch_size": 2,
            "data.max_prompt_length": 128,
            "data.max_response_length": 32,
            "actor_rollout_ref.model.path": sys.argv[1],
            "actor_rollout_ref.actor.ppo_mini_batch_size": 2,
            "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": 2,
            "actor_rollout_ref.rollout.name": "vllm",
            "actor_rollout_ref.rollout.n": 8,
            "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": 2,
            "actor_rollout_ref.rollout.tensor_model_parallel_size": 1,
            "trainer.logger": "console",
            "trainer.device": "cpu",
            "trainer.n_gpus_per_node": 1,
            "trainer.nnodes": 1,
            "trainer.total_training_steps": 1,
        }
        os.environ["HYDRA_FULL_ERROR"] = "1"
        os.chdir(folder)  # Hydra writes beside it
        sys.argv[1:] = [f"{name}={value}" for name, value in options.items()]
        runpy.run_module("verl.trainer.main_ppo", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()

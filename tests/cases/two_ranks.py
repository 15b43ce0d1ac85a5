"""Run by test_distributed.py, alone and as two ranks: gradients and metrics of one step of several learners.

python two_ranks.py OUT.safetensors      with RANK and WORLD_SIZE set, or not
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import MICRO

from grpo.config.run import BalanceOptions, LearnerOptions, LossOptions, MTPOptions
from grpo.data.word_problems import word_problems
from grpo.learner.learner import Learner
from grpo.learner.parallel import join
from policies.presets import PRESETS, build
from rewards.group_score import GroupScore
from rollout.group import Completion, Prompt, RolloutGroup

LOSSES = {
    "dapo": {},
    "grpo, kl": {"loss_type": "grpo", "beta": 0.1},
    "top entropy, bonus": {"top_entropy_quantile": 0.4, "entropy_coef": 0.01},
    "gae": {"advantage": "gae"},
    "two updates": {"epsilon": 0.1},
    "one row": {},
}


def groups_of(count: int) -> tuple[list[RolloutGroup], list[GroupScore]]:
    generator = torch.Generator().manual_seed(5)

    def ids(length: int) -> list[int]:
        return torch.randint(5, 100, (length,), generator=generator).tolist()

    groups, scores = [], []
    for p in range(count):
        completions = []
        for g in range(3):
            tokens = ids(3 + (5 * p + 3 * g) % 8)
            completions.append(Completion(tokens, [-2.0 - 0.01 * g] * len(tokens), "", "stop", 0))
        groups.append(RolloutGroup(Prompt(str(p), "", ids(6 + p), {}), completions))
        scores.append(GroupScore([0.3 * p, 1.0, 0.1], {}))
    return groups, scores


def gradients(learner: Learner) -> dict[str, torch.Tensor]:
    names = {id(learner.masters.of(p)): n for n, p in learner.policy.named_parameters()}
    tensors = [tensor for group in learner.optimizer.param_groups for tensor in group["params"]]
    return {names.get(id(t), f"value.{i}"): t.grad.clone() for i, t in enumerate(tensors) if t.grad is not None}


def main(out: Path) -> None:
    torch.set_num_threads(1)
    ranks = join(cpu=True)
    PRESETS["micro"] = MICRO
    corpus = [f"{row['question']}\n{row['answer']}\n" for row in word_problems("train", [1], count=50)]
    found, metrics = {}, {}
    for name, loss in LOSSES.items():
        torch.manual_seed(0)
        learner = Learner(
            build("micro", corpus, 0),
            LearnerOptions(tokens_per_micro_batch=40, max_grad_norm=1e9, updates_per_batch=1 + (name == "two updates")),
            MTPOptions(depth=2, share=0.5),
            LossOptions(**loss),
            balance=BalanceOptions(bias_rate=0.01, sequence_weight=0.01),
            ranks=ranks,
        )
        batch = learner.prepare(*groups_of(1 if name == "one row" else 5))
        metrics[name] = {k: v for k, v in learner.step(batch, 2).items() if not k.startswith("time/")}
        for parameter, gradient in gradients(learner).items():
            found[f"{name}/{parameter}"] = gradient
        found |= {f"{name}/{n}": b for n, b in learner.policy.named_buffers() if n.endswith("correction_bias")}
        if name == "dapo":
            rows = batch.rows
            metrics["sft"] = {k: v for k, v in learner.sft_step(rows, 3).items() if not k.startswith("time/")}
            found |= {f"sft/{parameter}": gradient for parameter, gradient in gradients(learner).items()}
    out = out.with_name(f"{out.stem}{ranks.rank}of{ranks.size}{out.suffix}")
    save_file(found, out)
    out.with_suffix(".json").write_text(json.dumps(metrics))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

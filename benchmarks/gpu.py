"""Everything that a CUDA machine can tell about quartet, within minutes: tests, rollouts, learning. `make gpu` runs it.

    tests       those marked `gpu`, and from two GPUs on the one of FSDP
    rollouts    ours against transformers' `generate`: benchmarks/rollout.py
    learning    a whole step of GRPO against TRL's `GRPOTrainer`: benchmarks/learner.py
    policies    SmolLM2-135M-Instruct (dense for the peers, its exact MLA form for us), and a random MLA/MoE policy of
                1.1 billion parameters, the same for both

Each piece is a process of its own, on one GPU unless it is the tests. A piece that fails is recorded with its error,
and the others still run. One JSON gets card, versions, commands and figures. The exit code is 0 if no piece failed, 1
if one failed or found no time left, 2 if there is no GPU. What was left out, with its reason, has not failed.

    make gpu                                              # runs/gpu.json
    make gpu ARGS="--json out.json --minutes 20"
    make gpu ARGS=--cpu                                   # the same in small, with the tiny policy, without a GPU
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:] = [path for path in sys.path if Path(path).resolve() != HERE]  # else `rollout` would be a file here

import torch  # noqa: E402

from grpo.run import hardware  # noqa: E402

# 1.1 billion parameters, of which a token uses 0.36 billion.
BILLION = {
    "hidden_size": 1536,
    "intermediate_size": 4096,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "kv_lora_rank": 256,
    "q_lora_rank": None,
    "n_routed_experts": 16,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 2048,
}
VOCABULARY = 32768
ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_DISABLED": "true",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(ROOT),
}
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
LOG = 4000  # characters of its output that a failed piece leaves
TRL, OURS = ("trl", "trl_no_checkpointing"), ("ours_mla",)


@dataclass(frozen=True)
class Sizes:
    """What the benchmarks compute: 1, 8, a quarter of `rows` and `rows` x tokens of a rollout, and a step of prompts x
    group x tokens."""

    rows: int
    tokens: int
    repeats: int
    prompts: int
    group: int
    step_tokens: int
    steps: int
    groups: int  # a micro-batch


GPU = Sizes(rows=256, tokens=128, repeats=2, prompts=16, group=8, step_tokens=128, steps=2, groups=4)
CPU = Sizes(rows=8, tokens=8, repeats=1, prompts=2, group=2, step_tokens=8, steps=1, groups=1)


@dataclass(frozen=True)
class Piece:
    """One process. `read` makes figures of what it has left when it ended well; `needs` is another piece's name."""

    name: str
    command: Sequence[str]
    read: Callable[[], Any] = lambda: None
    needs: str | None = None
    may_be_left_out: bool = False  # its failure is no failure of ours: the reason is recorded
    one_gpu: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)


# ---- the pieces -----------------------------------------------------------------------------------------------------


def pieces(device: str, folder: Path, models: Path) -> Iterator[Piece]:
    yield tests(device, folder)
    python, random = sys.executable, folder / "random"
    if device == "cpu":
        yield Piece("prepare tiny", [python, "benchmarks/gpu.py", "--prepare", str(random), "--cpu"])
        yield from compared("tiny", random, random, CPU, device, folder, (*TRL[1:], *OURS))
        return
    dense, mla = models / "smollm2-135m-instruct", models / "smollm2-135m-mla"
    script = [python, "examples/prepare_smollm2.py", "--dense", str(dense), "--converted", str(mla)]
    yield Piece("prepare smollm2", script, may_be_left_out=True)
    yield Piece("prepare 1b", [python, "benchmarks/gpu.py", "--prepare", str(random)])
    yield from compared("smollm2", dense, mla, GPU, device, folder, (*TRL, "ours_dense", *OURS))
    yield from compared("1b", random, random, GPU, device, folder, (*TRL, *OURS))


def tests(device: str, folder: Path) -> Piece:
    marked = [
        file.relative_to(ROOT) for file in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in file.read_text()
    ]
    report = folder / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--junitxml", str(report), *map(str, marked)]

    def read() -> dict[str, Any]:
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
        skipped = {case.get("name"): part.get("message") for case in cases for part in case.iter("skipped")}
        seconds = {case.get("name"): float(case.get("time", 0)) for case in cases}
        return {"passed": len(cases) - len(skipped), "skipped": skipped, "seconds": seconds}

    return Piece("tests", command, read, one_gpu=False, environment={"QUARTET_GPU_TESTS": device})


def compared(
    policy: str, dense: Path, mla: Path, sizes: Sizes, device: str, folder: Path, learners: Sequence[str]
) -> Iterator[Piece]:
    """Rollouts and steps of one policy, each contender by itself; the models are there once "prepare" has made them."""
    python, needs = sys.executable, f"prepare {policy}"
    models = ["--dense", str(dense), "--device", device]
    jobs = folder / f"{policy}.json"
    given = [str(dense), str(jobs), str(sizes.rows), str(sizes.tokens), str(sizes.repeats)]
    yield Piece(f"prompts {policy}", [python, "benchmarks/gpu.py", "--jobs", *given], needs=needs)
    for contender in ("generate", "ours k=0", *(["ours graphs", "ours plain"] if device == "cuda" else [])):
        out = folder / f"{policy} rollout {contender}.json"
        words = [python, "benchmarks/rollout.py", *models, "--model", str(mla), "--work", contender]
        read = partial(rates, jobs, out)
        yield Piece(f"rollout {policy}: {contender}", [*words, str(jobs), str(out)], read, f"prompts {policy}")
    for contender in learners:
        out = folder / f"{policy} step {contender}.json"
        words = [python, "benchmarks/learner.py", *models, "--mla", str(mla), "--data", "word_problems"]
        words += ["--dtype", "bfloat16", "--prompts", str(sizes.prompts), "--group_size", str(sizes.group)]
        words += ["--tokens", str(sizes.step_tokens), "--steps", str(sizes.steps), "--groups", str(sizes.groups)]
        words += ["--contender", contender, "--json", str(out), *(["--threads", "1"] if device == "cpu" else [])]
        yield Piece(f"step {policy}: {contender}", words, lambda out=out: json.loads(out.read_text()), needs)


def rates(jobs: Path, out: Path) -> dict[str, Any]:
    """Tokens a second of every job, and what the contender has measured."""
    result = json.loads(out.read_text())
    made = [benchmark("rollout").Job(**job) for job in json.loads(jobs.read_text())]
    each = {job.name: job.rows * job.tokens / median(result["seconds"][job.name]) for job in made}
    return {"tokens_per_second": each} | result


@cache
def benchmark(name: str) -> ModuleType:
    """A file of this folder, which is no package."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", HERE / f"{name}.py")
    assert spec
    assert spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- what some of them run ------------------------------------------------------------------------------------------


def write_policy(folder: Path, tiny: bool) -> None:
    """The tiny preset, or the policy of BILLION in bfloat16, with random weights and a chat template."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    from grpo.data.word_problems import word_problems
    from policies.policy import Policy
    from policies.presets import build

    corpus = [f"{row['question']}\n{row['answer']}\n" for row in word_problems("train", [1], count=500)]
    policy = build("tiny", corpus)
    policy.tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    if not tiny:
        tokenizer = policy.tokenizer
        tokenizer.add_tokens([f"<{i}>" for i in range(len(tokenizer), VOCABULARY)])  # else most ids have no text
        ends = {"eos_token_id": policy.config.eos_token_id, "pad_token_id": policy.config.pad_token_id}
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        trunk = DeepseekV3ForCausalLM(DeepseekV3Config(vocab_size=VOCABULARY, bos_token_id=None, **ends, **BILLION))
        trunk.generation_config = policy.trunk.generation_config
        policy = Policy(trunk, None, tokenizer)
        print(f"{sum(parameter.numel() for parameter in trunk.parameters()):,} parameters")
    policy.save(folder)


def write_jobs(tokenizer_of: str, out: str, rows: str, tokens: str, repeats: str) -> None:
    jobs = benchmark("rollout").make_jobs(
        Path(tokenizer_of),
        sorted({1, 8, max(8, int(rows) // 4), int(rows)}),
        [int(tokens)],
        int(repeats),
        data="word_problems",
    )
    Path(out).write_text(json.dumps([asdict(job) for job in jobs]))


# ---- running them ---------------------------------------------------------------------------------------------------


def run_all(all_pieces: Iterable[Piece], seconds: float) -> dict[str, dict[str, Any]]:
    """Each piece's record, by its name: command and seconds, then `result`, `error` or `left_out` with the reason.

    A piece gets a third of `seconds` at most, and all together get no more than `seconds`.
    """
    records: dict[str, dict[str, Any]] = {}
    end = time.monotonic() + seconds
    for piece in all_pieces:
        left = end - time.monotonic()
        record: dict[str, Any] = {"command": hardware.command(piece.command)}
        if piece.needs and "result" not in records[piece.needs]:
            record["left_out"] = f"it needs {piece.needs!r}, which there is not"
        elif left < 1:
            record["error"] = f"the {seconds / 60:g} minutes were over; raise --minutes"
        else:
            started = time.monotonic()
            record |= run_one(piece, min(left, seconds / 3))
            record["seconds"] = round(time.monotonic() - started, 1)
        records[piece.name] = record
        [kind] = {"result", "error", "left_out"} & record.keys()
        told = "passed" if kind == "result" else f"{kind.replace('_', ' ')}: {record[kind].splitlines()[-1]}"
        print(f"{record.get('seconds', 0.0):6.1f} s  {piece.name:34s} {told}", flush=True)
    return records


def run_one(piece: Piece, seconds: float) -> dict[str, Any]:
    environment = os.environ | ENVIRONMENT | piece.environment
    if piece.one_gpu:  # transformers' Trainer would spread its model over all
        environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            piece.command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, start_new_session=True
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what it has left behind
            process.wait()
        log.seek(0)
        said = log.read()[-LOG:].strip()
    try:
        if code == 0:
            return {"result": piece.read()}
        error = f"{said}\n" + (f"exit code {code}" if code is not None else f"it was ended after {seconds:.0f} s")
    except (OSError, ValueError, KeyError, ElementTree.ParseError) as wrong:
        error = f"{said}\nits results cannot be read: {type(wrong).__name__}: {wrong}"
    return {"left_out" if piece.may_be_left_out else "error": error}


def figures(records: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """What there is to compare: tokens a second of rollouts, medians of steps, and ours to every peer's."""
    rollouts: dict[str, dict[str, dict[str, float]]] = {}
    steps: dict[str, dict[str, Any]] = {}
    for name, record in records.items():
        kind, _, rest = name.partition(" ")
        policy, _, contender = rest.partition(": ")
        if kind == "rollout" and "result" in record:
            for job, rate in record["result"]["tokens_per_second"].items():
                rollouts.setdefault(policy, {}).setdefault(job, {})[contender] = rate
        if kind == "step" and "result" in record:
            result = record["result"]
            medians = {part: median(seconds) for part, seconds in result["seconds"].items()}
            found = {"median": medians, "peak_memory_gib": result["peak_memory_gib"]}
            steps.setdefault(policy, {})[contender] = found
    ratios = {policy: benchmark("learner")._ratios(found) for policy, found in steps.items()}
    return {"tokens_per_second": rollouts, "steps": steps, "ratios_to_trl": ratios}


def show(found: dict[str, Any]) -> None:
    for policy, jobs in found["tokens_per_second"].items():
        for job, rates_ in jobs.items():
            print(f"{policy}, {job}: " + ", ".join(f"{name} {rate:,.0f} tokens/s" for name, rate in rates_.items()))
    for policy, contenders in found["steps"].items():
        for name, step in contenders.items():
            seconds = ", ".join(f"{part} {value:.2f} s" for part, value in step["median"].items())
            print(f"{policy}, {name}: {seconds}, peak {step['peak_memory_gib']:.2f} GiB")
        for pair, ratio in found["ratios_to_trl"][policy].items():
            print(f"{policy}, {pair}: " + ", ".join(f"{part} {value:.2f}x" for part, value in ratio.items()))


def cards() -> list[dict[str, Any]]:
    """Name, memory and compute capability of every GPU, and the driver where nvidia-smi tells it."""
    found = []
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        capability = f"{card.major}.{card.minor}"
        found.append({"name": card.name, "memory_gib": round(card.total_memory / 2**30, 1), "capability": capability})
    with suppress(OSError):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        said = subprocess.run(query, capture_output=True, text=True, check=False)
        for card_, driver in zip(found, said.stdout.splitlines(), strict=False):
            card_["driver"] = driver
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where everything goes (default: runs/gpu.json)")
    parser.add_argument("--cpu", action="store_true", help="the same in small, without a GPU")
    parser.add_argument("--minutes", type=float, default=9.0, help="no piece runs longer than this after the start")
    parser.add_argument("--models", type=Path, default=Path("models"), help="where SmolLM2 is, or will be")
    parser.add_argument("--prepare", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--jobs", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.prepare or args.jobs:
        write_jobs(*args.jobs) if args.jobs else write_policy(args.prepare, tiny=args.cpu)
        return 0
    if not args.cpu and not torch.cuda.is_available():
        print(
            "There is no CUDA device here; `make gpu ARGS=--cpu` runs the same in small without one.", file=sys.stderr
        )
        return 2
    out = args.json or ROOT / "runs" / ("gpu_cpu_form.json" if args.cpu else "gpu.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        device = "cpu" if args.cpu else "cuda"
        chosen = pieces(device, Path(folder), args.models)
        if args.cpu:  # threads that wait for each other are slow beside other work
            chosen = (replace(piece, environment={**piece.environment, **ONE_THREAD}) for piece in chosen)
        records = run_all(chosen, 60 * args.minutes)
    failed = [name for name, record in records.items() if "error" in record]
    report = {
        "form": "small, on the CPU" if args.cpu else "GPU",
        "environment": hardware.describe() | {"cards": cards(), "cuda": torch.version.cuda},
        "sizes": asdict(CPU if args.cpu else GPU),
        "seconds": round(time.monotonic() - started, 1),
        "failed": failed,
        "figures": figures(records),
        "pieces": json.loads(json.dumps(records).replace(folder, "OUT")),
    }
    out.write_text(json.dumps(report, indent=1) + "\n")
    show(report["figures"])
    print(f"{report['seconds']} s; {f'failed: {failed}' if failed else 'everything passed'}; written to {out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""What a CUDA machine can tell about quartet, the most important first. `make gpu` runs it; it needs no network.

    checks      benchmarks/on_device.py: kernels, gradients, profiles, recorded rounds, publication, memory, resuming
    tests       those marked `gpu`, and from two GPUs on the one of FSDP
    rollouts    ours against transformers' `generate`: benchmarks/rollout.py
    steps       a whole step of GRPO, ours and last TRL's `GRPOTrainer`: benchmarks/learner.py
    policies    a random MLA/MoE policy of 1.1 billion parameters, the same for both, and where it can be had
                SmolLM2-135M-Instruct (dense for the peers, its exact MLA form for us)

Each piece is a process of its own, of two minutes at most, on one GPU unless it is a test. Its figures, its error or
why it was left out are in the JSON as soon as it ends. A piece is left out where a package is missing that it imports;
with `--wheels FOLDER` packages come from there. The exit code is 0 if no piece failed, 1 if one failed or found no time
left, 2 if there is no GPU.

    make gpu                                              # runs/gpu.json
    make gpu ARGS="--json out.json --minutes 20 --wheels wheels"
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
from itertools import chain
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# Else `rollout` would be a file here; an image for training has not installed quartet.
sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path).resolve() != HERE)]

import torch  # noqa: E402

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
}
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
LOG = 4000  # characters of its output that a failed piece leaves
PIECE_S, SMALL_PIECE_S = 120, 600  # the latter on a CPU that others use too
# What a piece imports beside torch, transformers, accelerate and peft, which every image for training has.
OURS_NEEDS = ("pydantic", "zstandard", "xxhash")
TEST_NEEDS, TRL_NEEDS = (*OURS_NEEDS, "pytest", "hypothesis"), (*OURS_NEEDS, "datasets", "trl")
CHECKS: dict[str, Sequence[str]] = {"decoding": (), "learning": OURS_NEEDS, "recorded": ()}
LATER_CHECKS = ("publication", "memory", "sleep", "resume")
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
    """One process. `read` makes figures of what it has printed or left when it ended well; `needs` is another piece's
    name, and `modules` are what must be importable."""

    name: str
    command: Sequence[str]
    read: Callable[[str], Any] = lambda output: None
    needs: str | None = None
    modules: Sequence[str] = ()
    may_be_left_out: bool = False  # its failure is no failure of ours: the reason is recorded
    one_gpu: bool = True
    reads_failures: bool = False  # `read` makes figures of an exit code of 1, too
    environment: Mapping[str, str] = field(default_factory=dict)


# ---- the pieces -----------------------------------------------------------------------------------------------------


def pieces(device: str, folder: Path, models: Path) -> Iterator[Piece]:
    small, random = device == "cpu", folder / "random"
    sizes, name = (CPU, "tiny") if small else (GPU, "1b")

    def check(name: str, modules: Sequence[str], needs: str | None) -> Piece:
        words = [sys.executable, "benchmarks/on_device.py", name, device, str(random), *(["--small"] if small else [])]
        return Piece(name, words, lambda output: json.loads(output.splitlines()[-1]), needs, modules)

    yield check("kernels", (), None)
    yield check("flex", (), None)
    yield tests(device, folder, "tests", "not fsdp")
    prepared = f"prepare {name}"
    words = [sys.executable, "benchmarks/gpu.py", "--prepare", str(random), *(["--cpu"] if small else [])]
    yield Piece(prepared, words)
    for each, modules in CHECKS.items():
        yield check(each, modules, prepared)
    yield from rollouts(name, random, random, sizes, device, folder)
    for each in LATER_CHECKS:
        yield check(each, OURS_NEEDS, prepared)
    yield tests(device, folder, "tests of fsdp", "fsdp")
    yield from steps(name, random, random, sizes, device, folder, OURS)
    trl = [steps(name, random, random, sizes, device, folder, TRL[1:] if small else TRL)]
    if not small:
        dense, mla = models / "smollm2-135m-instruct", models / "smollm2-135m-mla"
        prepare = "examples/05_gsm8k_recipe/prepare_smollm2.py"
        script = [sys.executable, prepare, "--dense", str(dense), "--converted", str(mla)]
        yield Piece("prepare smollm2", script, may_be_left_out=True)
        yield from rollouts("smollm2", dense, mla, sizes, device, folder)
        yield from steps("smollm2", dense, mla, sizes, device, folder, ("ours_dense", *OURS))
        trl.append(steps("smollm2", dense, mla, sizes, device, folder, TRL))
    yield from chain(*trl)


def tests(device: str, folder: Path, name: str, chosen: str) -> Piece:
    marked = [
        file.relative_to(ROOT) for file in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in file.read_text()
    ]
    report = folder / f"{name}.xml"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-k", chosen, "-vv", "--junitxml", str(report)]

    def read(_: str) -> dict[str, Any]:
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
        skipped, failed = (
            {case.get("name"): part.get("message") for case in cases for kind in kinds for part in case.iter(kind)}
            for kinds in (("skipped",), ("failure", "error"))
        )
        seconds = {case.get("name"): float(case.get("time", 0)) for case in cases}
        passed = len(cases) - len(skipped) - len(failed)
        return {"passed": passed, "skipped": skipped, "seconds": seconds} | ({"failed": failed} if failed else {})

    environment, words = {"QUARTET_GPU_TESTS": device}, [*command, *map(str, marked)]
    return Piece(name, words, read, modules=TEST_NEEDS, one_gpu=False, reads_failures=True, environment=environment)


def rollouts(policy: str, dense: Path, mla: Path, sizes: Sizes, device: str, folder: Path) -> Iterator[Piece]:
    """Rollouts of one policy, each contender by itself; the models are there once "prepare" has made them."""
    jobs, needs = folder / f"{policy}.json", f"prompts {policy}"
    words = [sys.executable, "benchmarks/gpu.py", "--jobs", str(dense), str(jobs)]
    words += [str(sizes.rows), str(sizes.tokens), str(sizes.repeats)]
    yield Piece(needs, words, needs=f"prepare {policy}", modules=OURS_NEEDS)
    for contender in ("generate", "ours k=0", *(["ours graphs", "ours plain"] if device == "cuda" else [])):
        out = folder / f"{policy} rollout {contender}.json"
        words = [sys.executable, "benchmarks/rollout.py", "--dense", str(dense), "--device", device]
        words += ["--model", str(mla), "--work", contender, str(jobs), str(out)]
        yield Piece(f"rollout {policy}: {contender}", words, partial(rates, jobs, out), needs, OURS_NEEDS)


def steps(
    policy: str, dense: Path, mla: Path, sizes: Sizes, device: str, folder: Path, learners: Sequence[str]
) -> Iterator[Piece]:
    """Steps of one policy, likewise."""
    for contender in learners:
        out = folder / f"{policy} step {contender}.json"
        words = [sys.executable, "benchmarks/learner.py", "--dense", str(dense), "--device", device]
        words += ["--mla", str(mla), "--data", "word_problems"]
        words += ["--dtype", "bfloat16", "--prompts", str(sizes.prompts), "--group_size", str(sizes.group)]
        words += ["--tokens", str(sizes.step_tokens), "--steps", str(sizes.steps), "--groups", str(sizes.groups)]
        words += ["--contender", contender, "--json", str(out), *(["--threads", "1"] if device == "cpu" else [])]
        modules = TRL_NEEDS if contender in TRL else OURS_NEEDS
        read = partial(lambda out, _: json.loads(out.read_text()), out)
        yield Piece(f"step {policy}: {contender}", words, read, f"prepare {policy}", modules)


def rates(jobs: Path, out: Path, _: str = "") -> dict[str, Any]:
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

    from policies.policy import Policy
    from policies.presets import build
    from rewards.data.word_problems import word_problems

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


def run_all(
    all_pieces: Iterable[Piece],
    seconds: float,
    most: float = PIECE_S,
    write: Callable[[dict[str, dict[str, Any]]], None] = lambda records: None,
) -> dict[str, dict[str, Any]]:
    """Each piece's record, by its name: command and seconds, then `result`, `error` or `left_out` with the reason.

    A piece gets `most` and a third of `seconds` at most, and all together get no more than `seconds`. `write` gets all
    records after each piece, so that a run that is cut off has said what it knows.
    """
    from grpo.run import hardware  # wheels may have made it importable

    records: dict[str, dict[str, Any]] = {}
    end = time.monotonic() + seconds
    for piece in all_pieces:
        left = end - time.monotonic()

        record: dict[str, Any] = {"command": hardware.command(piece.command)}
        if lacking := missing(piece.modules):
            record["left_out"] = f"not installed here: {', '.join(lacking)}; --wheels FOLDER takes packages from there"
        elif piece.needs and "result" not in records[piece.needs]:
            record["left_out"] = f"it needs {piece.needs!r}, which there is not"
        elif left < 1:
            record["error"] = f"the {seconds / 60:g} minutes were over; raise --minutes"
        else:
            started, before = time.monotonic(), os.times()
            record |= run_one(piece, min(left, most, seconds / 3))
            record["seconds"] = round(time.monotonic() - started, 1)
            after = os.times()
            cpu = after.children_user + after.children_system - before.children_user - before.children_system
            record["cpu_seconds"] = round(cpu, 1)
        records[piece.name] = record
        write(records)
        [kind] = {"result", "error", "left_out"} & record.keys()
        told = "passed" if kind == "result" else f"{kind.replace('_', ' ')}: {record[kind].splitlines()[-1]}"
        print(f"{record.get('seconds', 0.0):6.1f} s  {piece.name:34s} {told}", flush=True)
    return records


def missing(modules: Iterable[str]) -> list[str]:
    return [module for module in modules if importlib.util.find_spec(module) is None]


def add_wheels(wheels: Path, folder: Path) -> None:
    """Installs into `folder` what pieces lack and `wheels` has, and puts it on the path of this process and of pieces.

    Nothing of the machine's own environment is changed.
    """
    for module in missing(TEST_NEEDS + TRL_NEEDS):
        words = ["--no-index", "--find-links", str(wheels), "--prefix", str(folder), module]
        done = subprocess.run(
            [sys.executable, "-m", "pip", "install", *words], capture_output=True, text=True, check=False
        )
        print(f"{module}: {'from ' + str(wheels) if done.returncode == 0 else done.stderr.strip().splitlines()[-1]}")
    found = [str(path) for path in folder.rglob("*-packages")]
    sys.path += found
    os.environ["PYTHONPATH"] = os.pathsep.join([*found, *filter(None, [os.environ.get("PYTHONPATH")])])
    importlib.invalidate_caches()


def run_one(piece: Piece, seconds: float) -> dict[str, Any]:
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(path)} | piece.environment
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
        output = log.read().strip()
    said = output[-LOG:]
    try:
        if code == 0:
            return {"result": piece.read(output)}
        if code == 1 and piece.reads_failures:
            failed = piece.read(output)
            return {"result": failed, "error": f"failed: {', '.join(map(str, failed['failed']))}"}
        error = f"{said}\n" + (f"exit code {code}" if code is not None else f"it was ended after {seconds:.0f} s")
    except (OSError, ValueError, LookupError, ElementTree.ParseError) as wrong:
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
    parser.add_argument("--wheels", type=Path, help="a folder of wheels, for what this machine lacks")
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
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        if args.wheels:
            add_wheels(args.wheels, Path(folder, "wheels"))
        device = "cpu" if args.cpu else "cuda"
        chosen = pieces(device, Path(folder), args.models)
        if args.cpu:  # threads that wait for each other are slow beside other work
            chosen = (replace(piece, environment={**piece.environment, **ONE_THREAD}) for piece in chosen)
        from grpo.run import hardware

        environment = hardware.describe() | {"cards": cards(), "cuda": torch.version.cuda}

        def write(records: dict[str, dict[str, Any]]) -> None:
            report.update(
                form="small, on the CPU" if args.cpu else "GPU",
                environment=environment,
                sizes=asdict(CPU if args.cpu else GPU),
                seconds=round(time.monotonic() - started, 1),
                failed=[name for name, record in records.items() if "error" in record],
                figures=figures(records),
                pieces=json.loads(json.dumps(records).replace(folder, "OUT")),
            )
            out.write_text(json.dumps(report, indent=1) + "\n")

        run_all(chosen, 60 * args.minutes, SMALL_PIECE_S if args.cpu else PIECE_S, write)
    failed = report["failed"]
    show(report["figures"])
    print(f"{report['seconds']} s; {f'failed: {failed}' if failed else 'everything passed'}; written to {out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

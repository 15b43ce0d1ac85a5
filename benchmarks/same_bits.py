"""Whether two commits compute the same bits: the same short runs with both, side by side, file by file.

    python benchmarks/same_bits.py BASE            # against the working tree
    python benchmarks/same_bits.py BASE HEAD --only lora sft --json out.json

Both sides decode by the same table of draft costs, which the clock would make another one each time. Compared are the
tensors of every checkpoint and policy (weights, moments), the state beside them (generators, order of the data), the
sampled ids with their log-probabilities and rewards, and the metrics that are no times. Tensors are compared bit for
bit, JSON by value. `RENAMED` says what a newer commit calls otherwise. The exit code is 1 where anything differs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import zstandard
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[1]
HERE = Path(__file__).resolve()
# What a newer commit calls otherwise: patterns of names in JSON, in tensor files and of files. The base's names are
# rewritten before they are compared.
RENAMED: list[tuple[str, str]] = [
    (r"^group/tied$", "group/zero_variance"),
    (r"^group/refilled$", "group/resampled"),
    (r"^source/(.+)/tied$", r"source/\1/zero_variance"),
    (r"^completion/clipped$", "completion/truncated"),
    (r"^eval/completion_clipped$", "eval/completion_truncated"),
    (r"^eval/without_mark$", "eval/unscored"),
    (r"^policy/step_kl$", "policy/approx_kl"),
    (r"^loss/own$", "loss/custom"),
    (r"^alarm/right/", "alarm/correct/"),
    (r"^agent/segments_mean$", "agent/branches_mean"),
    (r"^forks/(rows|tokens)$", r"branches/\1"),
    (r"^corpus/taught_tokens$", "corpus/trained_tokens"),
    (r"^draft/head_age$", "draft/mtp_head_age"),
    (r"^publish/bytes$", "sync/bytes"),
    (r"^canary/", "sync_check/"),
]
# Names that a newer commit leaves out, since the feature has gone: the base's values are not looked at.
REMOVED = [r"sources", r"empty", r"lookups", r"pass_rates", r"skipped_in_a_row"]
OLD_OPTIONS = {"--sft.": "--warm_start.", "--rollout.staleness": "--rollout.ahead"}
OLD_OPTIONS |= {"--rollout.max_resamples": "--rollout.refill_draws"}
UNTIMED = re.compile(r"^(time/|speed/|memory/)|seconds|^(time|pid|rss)$")

FEW = ["--model", "micro", "--prompts_per_step", "8", "--rollout.group_size", "4", "--eval.limit", "16"]
WORDS = ["--model", "micro", "--data.name", "word_problems", "--data.levels", "[1]", "--eval.limit", "16"]
SHORT = [*FEW, *WORDS, "--sft.steps", "20", "--steps", "4", "--rollout.max_completion_tokens", "24"]
LETTERS = ["--rewards", "[{function: TESTS/cases/letters.py:letters}]"]  # which ties no group, so that steps teach
SHORT += LETTERS
LEARNS = [*SHORT, "--rollout.draft_tokens", "2", "--learner.learning_rate", "1e-3"]  # no gain is measured: no rest
# The options of a game of several turns, which other commits have under other names.
GAME = ["--data.name", "word_game", "--environment", "word_game", "--max_turns", "3", *FEW, *LETTERS]
GAME += ["--sft.batch_size", "32", "--sft.learning_rate", "2e-3", "--sft.warmup_steps", "20"]
GAME += ["--rollout.max_completion_tokens", "32", "--rollout.draft_tokens", "0", "--rollout.prompts_per_shard", "32"]
GAME += ["--learner.learning_rate", "4e-4", "--learner.tokens_per_micro_batch", "4096", "--mtp.loss_weight", "0"]
GAME += ["--loss.scale_rewards", "none", "--eval.every", "15"]
BIAS = ["--balance.bias_rate", "0.1"]
# By name: the commands of a scenario, each in a folder of its own. FIRST is the first one's, TESTS that of the tests.
SCENARIOS: dict[str, list[list[str]]] = {
    "demo": [["train", "benchmarks/learn/words.yaml"]],
    "short": [["train", *LEARNS, "--checkpoint.every", "2", "--eval.every", "2"]],
    "lora": [["train", *LEARNS, "--lora", "{rank: 4, alpha: 8}", "--loss.beta", "0.05", "--loss.entropy_coef", "0.01"]],
    "value": [["train", *LEARNS, "--loss.advantage", "gae", "--learner.updates_per_batch", "2", *BIAS]],
    "curriculum": [
        [
            "train",
            *LEARNS,
            "--curriculum.steps",
            "4",
            "--curriculum.shortest_share",
            "0.5",
            "--rollout.max_resamples",
            "1",
        ]
    ],
    "environment": [["train", *GAME, "--sft.steps", "30", "--steps", "3"]],
    "agent": [["train", *LEARNS, "--agent", "TESTS/cases/agents.py:once"]],
    # A worker would measure costs of its own, so the number of drafts is fixed.
    "ahead": [["train", *LEARNS, "--rollout.staleness", "2", "--rollout.draft_tokens", "2", "--steps", "6"]],
    "ranks": [["train", *LEARNS, "--device", "cpu", "--learner.parallel.fsdp", "2"]],
    "sft": [["sft", *WORDS, "--steps", "20"]],
    "mtp": [
        ["sft", *WORDS, "--steps", "20"],
        [
            "mtp",
            "FIRST/policy",
            *FEW[2:],
            "--steps",
            "2",
            "--mtp.epochs",
            "2",
            "--rollout.max_completion_tokens",
            "24",
        ],
    ],
    "resume": [["train", *LEARNS, "--checkpoint.every", "1", "--stop_after", "2"], ["--resume"]],
}
RANKS = {"ranks": 2}
STOPPED = 143  # the exit code of a run that --stop_after has ended


# ---- a side ---------------------------------------------------------------------------------------------------------


def tree_of(commit: str | None, folder: Path) -> Path:
    """The files of a commit in `folder`; the working tree itself for None."""
    if commit is None:
        return ROOT
    folder.mkdir(parents=True)
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
    subprocess.run(["tar", "x"], cwd=folder, input=archive, check=True)
    return folder


def start(tree: Path, words: list[str], ranks: int, log: Path) -> list[subprocess.Popen]:
    """The command in that tree, as one process or as several ranks."""
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    port = 20000 + zlib.crc32(str(log).encode()) % 12000  # another one for each side
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    shared |= {"LOCAL_WORLD_SIZE": str(ranks), "ACCELERATE_USE_CPU": "true"}
    processes = []
    for rank in range(ranks):
        of_rank = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        command = [sys.executable, "-P", str(HERE), "--inside", *words]
        with log.open("a") as output:
            processes.append(
                subprocess.Popen(command, cwd=tree, env=environment | of_rank, stdout=output, stderr=subprocess.STDOUT)
            )
    return processes


def old_word(word: str) -> str:
    """The word of a command line under the names that options had in 0.2.

    >>> old_word("--sft.steps")
    '--warm_start.steps'
    """
    for new, old in OLD_OPTIONS.items():
        if word.startswith(new):
            return old + word.removeprefix(new)
    return word


def inside(words: list[str]) -> int:
    """In the tree: the command, with costs of drafts that are the same everywhere, and a policy of two small layers."""
    from policies import presets

    try:
        from rollout.cost_table import CostTable
        from rollout.decoding import costs
    except ImportError:  # a commit before the rooms of rollout/
        costs = importlib.import_module("rollout.costs")
        CostTable = importlib.import_module("rollout.depth").CostTable

    def measure(decoder: Any, work: Any, depth: int) -> Any:
        sizes = costs._sizes(work.rows)
        table = [[(1 + 0.02 * rows) * (1 + 0.15 * k) for k in range(depth + 1)] for rows in sizes]
        return CostTable(sizes, table)

    costs.measure = measure
    presets.PRESETS["micro"] = presets.PRESETS["tiny"] | {
        "hidden_size": 48,
        "intermediate_size": 96,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 2,
    }
    from grpo.__main__ import main

    if importlib.util.find_spec("rollout.weight_sync") is None:  # a commit before these names
        words = [old_word(word) for word in words]
    sys.argv = ["quartet", *words]
    return int(main() or 0)


def run_scenario(name: str, trees: list[Path], folder: Path) -> list[list[Path]]:
    """The run folders of each side, which run at the same time. Raises RuntimeError where a command fails."""
    outputs: list[list[Path]] = [[] for _ in trees]
    for number, words in enumerate(SCENARIOS[name]):
        running = []
        for side, tree in enumerate(trees):
            runs = outputs[side]
            if words == ["--resume"]:
                first = SCENARIOS[name][0]
                words_here = [*first[: first.index("--stop_after")], "--resume", "auto", "--output_dir", str(runs[0])]
                words_here = [word.replace("TESTS", str(ROOT / "tests")) for word in words_here]
            else:
                output = folder / name / f"side{side}" / str(number)
                output.parent.mkdir(parents=True, exist_ok=True)
                first = str(runs[0]) if runs else ""
                words_here = [word.replace("TESTS", str(ROOT / "tests")).replace("FIRST", first) for word in words]
                words_here += ["--output_dir", str(output)]
                runs.append(output)
            log = folder / f"{name}.side{side}.log"
            running.append((log, start(tree, words_here, RANKS.get(name, 1), log)))
        for log, processes in running:
            if any(process.wait() not in (0, STOPPED) for process in processes):
                raise RuntimeError(f"{name} failed: {log}\n{log.read_text()[-2000:]}")
    return outputs


# ---- what differs ---------------------------------------------------------------------------------------------------


def new_name(name: str) -> str:
    for old, new in RENAMED:
        name = re.sub(old, new, name)
    return name


def is_removed(name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in REMOVED)


def differences_of_values(base: Any, head: Any, place: str) -> Iterator[str]:
    """Where two values of JSON differ; times are left out, and the base's names are rewritten."""
    if isinstance(base, dict) and isinstance(head, dict):
        base = {new_name(key): value for key, value in base.items() if not is_removed(key) and not UNTIMED.search(key)}
        head = {key: value for key, value in head.items() if not UNTIMED.search(key)}
        for key in base.keys() | head.keys():
            if key not in base or key not in head:
                yield f"{place}.{key} is {'new' if key in head else 'gone'}"
            else:
                yield from differences_of_values(base[key], head[key], f"{place}.{key}")
    elif isinstance(base, list) and isinstance(head, list) and len(base) == len(head):
        for i, (one, other) in enumerate(zip(base, head, strict=True)):
            yield from differences_of_values(one, other, f"{place}[{i}]")
    elif base != head and not (base != base and head != head):  # two NaN are the same
        yield f"{place}: {base!r:.80} -> {head!r:.80}"


def differences_of_tensors(base: Path, head: Path, place: str) -> Iterator[str]:
    with safe_open(base, "pt") as old, safe_open(head, "pt") as new:
        names = {new_name(name): name for name in old.keys() if not is_removed(name)}  # noqa: SIM118
        for name in names.keys() | set(new.keys()):
            if name not in names or name not in new.keys():  # noqa: SIM118
                yield f"{place}: tensor {name} is {'new' if name not in names else 'gone'}"
                continue
            one, other = old.get_tensor(names[name]), new.get_tensor(name)
            if one.dtype != other.dtype or one.shape != other.shape:
                yield f"{place}: {name} is {other.dtype} {list(other.shape)}, was {one.dtype} {list(one.shape)}"
            elif not torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)):
                largest = (one.double() - other.double()).abs().nan_to_num().max().item()
                yield f"{place}: {name} differs by up to {largest:.3g}"


def values_of(file: Path) -> Any:
    """What a file of JSON, of JSON lines, or of compressed JSON lines holds."""
    if file.suffix == ".json":
        return json.loads(file.read_text())
    data = file.read_bytes()
    text = (
        zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True).read()
        if file.suffix == ".zst"
        else data
    )
    return [json.loads(line) for line in text.splitlines()]


def compared_files(folder: Path) -> dict[str, Path]:
    """By name: tensors, the state beside them, rollouts and metrics. Manifests hold hashes of files that hold times."""
    names = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        kind = file.suffix in (".safetensors", ".zst") or file.name in (
            "state.json",
            "metrics.jsonl",
            "trained_on.json",
        )
        if kind and not is_removed(name):
            names[name] = file
    return names


def differences(base: Path, head: Path) -> tuple[int, list[str]]:
    """How many files were compared, and what differs in them."""
    old = {new_name(name): file for name, file in compared_files(base).items()}
    new = compared_files(head)
    problems = [f"{name} is {'new' if name in new else 'gone'}" for name in sorted(old.keys() ^ new.keys())]
    both = sorted(old.keys() & new.keys())
    for name in both:
        if name.endswith(".safetensors"):
            problems += differences_of_tensors(old[name], new[name], name)
        else:
            problems += differences_of_values(values_of(old[name]), values_of(new[name]), name)
        if Path(name).name == "metrics.jsonl":
            updates = [line["learner/updates"] for line in values_of(new[name]) if "learner/updates" in line]
            problems += [f"{name}: no step has taught anything"] if updates and not any(updates) else []
    return len(both), problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="a commit")
    parser.add_argument("head", nargs="?", help="another commit; without it the working tree")
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, default=list(SCENARIOS), metavar="SCENARIO")
    parser.add_argument("--skip", nargs="+", choices=SCENARIOS, default=[], metavar="SCENARIO")
    parser.add_argument("--keep", type=Path, help="a folder for the runs and their logs, which then stay")
    parser.add_argument("--json", type=Path, help="write the outcome here")
    args = parser.parse_args()
    folder = args.keep or Path(tempfile.mkdtemp(prefix="same_bits_"))
    outcome: dict[str, dict[str, Any]] = {}
    try:
        trees = [tree_of(args.base, folder / "base"), tree_of(args.head, folder / "head")]
        for name in [name for name in args.only if name not in args.skip]:
            started = time.perf_counter()
            files, problems = 0, list[str]()
            for base, head in zip(*run_scenario(name, trees, folder), strict=True):
                count, more = differences(base, head)
                files, problems = files + count, problems + more
            outcome[name] = {"files": files, "differences": problems, "seconds": round(time.perf_counter() - started)}
            print(
                f"{name:12} {files:4} files  {f'{len(problems)} DIFFERENCES' if problems else 'same bits'}", flush=True
            )
            for problem in problems[:10]:
                print(f"    {problem}", flush=True)
    finally:
        if args.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    if args.json:
        args.json.write_text(json.dumps({"base": args.base, "head": args.head, "scenarios": outcome}, indent=1) + "\n")
    return int(any(one["differences"] or not one["files"] for one in outcome.values()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        sys.exit(inside(sys.argv[2:]))
    sys.exit(main())

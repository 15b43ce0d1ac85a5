"""One table of peers, by one command: a step, a task learned to a reward, ten mistakes.

    make peers                                   # the full form: under an hour on two quiet cores
    make peers ARGS=--small                      # the same in small, in minutes: it shows that it runs, not how fast
    python -m benchmarks.peers --only ours trl --parts step task
    python -m benchmarks.peers --table           # the page anew, from the JSON alone

Every contender runs in a process of its own, in turn with the others, timed by itself, with equal threads. The JSON has
every number, how each contender was configured, and how far the repeats are apart. Parts that are not asked for keep
what the JSON has of an earlier run of the same sizes, versions and machine.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.peers import mistakes, model, table
from benchmarks.peers.process import ROOT, Started, clean, module
from benchmarks.peers.sizes import CONFIGURED, FULL, SMALL, STEP_CONTENDERS, TASK_CONTENDERS, Form
from benchmarks.peers.step import questions

PARTS = ("step", "task", "mistakes")


def contend(command: Sequence[str], out: Path, seconds: float, threads: int) -> dict[str, Any]:
    """What a contender has written, with the peak of its tree since it is warm; or its error."""
    warm = out.with_suffix(".warm")
    started = Started(command, threads=threads)
    try:
        began = time.perf_counter()
        started.wait(seconds, until=warm.exists)
        started.peak = 0 if warm.exists() else started.peak
        started.wait(max(0.0, seconds - (time.perf_counter() - began)))
    finally:
        ended = started.end()
    if ended.code != 0:
        why = f"ended after {seconds:.0f} s" if ended.code is None else f"exit code {ended.code}"
        return {"error": f"{why}: {clean(ended.last_line)[:300]}"}
    return json.loads(out.read_text()) | {
        "peak_rss_gib": ended.peak_rss_bytes / 2**30,
        "process_s": round(ended.seconds, 1),
    }


def spread(values: Sequence[float]) -> float:
    """Largest minus smallest, by the median."""
    return (max(values) - min(values)) / median(values) if values and median(values) else 0.0


def repeated(
    names: Sequence[str], run: Any, repeats: int
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, dict[str, Any]]]:
    """Every contender as often as asked, in turn; who fails once is not tried again."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    failed: dict[str, dict[str, Any]] = {}
    for number in range(repeats):
        for name in names:
            if name not in failed:
                found = run(name, number)
                if "error" in found:
                    failed[name] = found
                else:
                    runs[name].append(found)
                told = found.get("error") or f"{found['process_s']} s"
                print(f"{name}, {number + 1} of {repeats}: {told}", flush=True)
    return runs, failed


def step(form: Form, names: Sequence[str], folder: Path) -> dict[str, Any]:
    source = folder / "step.json"
    source.write_text(json.dumps(asdict(form.step)))

    def run(name: str, number: int) -> dict[str, Any]:
        if name == "ours_vllm" and not (ROOT / form.step.vllm).exists():
            return {"error": "vLLM is not there; `make vllm` installs it"}
        out = folder / f"{name}_{number}.json"
        return contend(module("step", name, source, out), out, form.limit_s, form.step.threads)

    runs, failed = repeated(names, run, form.repeats)
    contenders: dict[str, Any] = {}
    for name in names:
        if name in failed:
            contenders[name] = failed[name]
            continue
        phases = {phase: [s for one in runs[name] for s in one["seconds"][phase]] for phase in runs[name][0]["seconds"]}
        contenders[name] = {
            "median": {phase: median(seconds) for phase, seconds in phases.items()},
            "spread": {phase: spread(seconds) for phase, seconds in phases.items()},
            "seconds": phases,
            "peak_rss_gib": median(one["peak_rss_gib"] for one in runs[name]),
            "mismatch": {
                "mean": fmean(one["mismatch"]["mean"] for one in runs[name]),
                "max": max(one["mismatch"]["max"] for one in runs[name]),
                "tokens": sum(one["mismatch"]["tokens"] for one in runs[name]),
            },
            "prompts": runs[name][0]["prompts"],
            "settings": runs[name][0].get("settings"),
        }
    read = [one["prompts"] for name in names for one in runs[name]]
    return {"contenders": contenders, "prompts_equal": all(prompts == read[0] for prompts in read)}


def task(form: Form, names: Sequence[str], folder: Path) -> dict[str, Any]:
    policy = folder / "policy"
    source = folder / "warm.json"
    source.write_text(json.dumps(asdict(form.task)))
    started = Started(module("learns", "warm", source, policy))
    started.wait(form.limit_s)
    ended = started.end()
    if ended.code != 0:
        return {"contenders": {name: {"error": f"the SFT stage: {clean(ended.last_line)}"} for name in names}}
    print(f"SFT stage: {ended.seconds:.0f} s", flush=True)

    def run(name: str, number: int) -> dict[str, Any]:
        seeded = folder / f"task_{number}.json"
        seeded.write_text(json.dumps(asdict(replace(form.task, seed=number))))
        out = folder / f"task_{name}_{number}.json"
        return contend(module("learns", name, seeded, out, policy), out, form.limit_s, form.task.threads)

    runs, failed = repeated(names, run, form.repeats)
    contenders = dict(failed)
    for name in [name for name in names if name not in failed]:
        contenders[name] = {
            "steps": [one["steps"] for one in runs[name]],
            "seconds": [one["seconds"] for one in runs[name]],
            "spread": {"seconds": spread([one["seconds"] for one in runs[name]])},
            "seconds_a_step": median(one["seconds_a_step"] for one in runs[name]),
            "first_reward": fmean(one["first_reward"] for one in runs[name]),
            "best_reward": fmean(one["best_reward"] for one in runs[name]),
            "rewards": [one["rewards"] for one in runs[name]],
            "peak_rss_gib": median(one["peak_rss_gib"] for one in runs[name]),
            "settings": runs[name][0].get("settings"),
        }
    return {"contenders": {name: contenders[name] for name in names}}


def measure(form: Form, parts: Sequence[str], only: Sequence[str]) -> Iterator[tuple[str, dict[str, Any], float]]:
    """Every part that is asked for, what was found, and the seconds that it took."""
    sides = [side for side in ("ours", "trl") if side in only]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        data = folder / "data"
        data.mkdir()
        if "mistakes" in parts:
            model.write(data)
        makers = {
            "step": lambda: step(form, [name for name in STEP_CONTENDERS if name in only], folder),
            "task": lambda: task(form, [name for name in TASK_CONTENDERS if name in only], folder),
            "mistakes": lambda: mistakes.make_all(data, form.mistake_s, sides),
        }
        for part in parts:
            print(f"== {part}", flush=True)
            began = time.monotonic()
            yield part, makers[part](), round(time.monotonic() - began, 1)


def described(command: str, vllm: str) -> dict[str, Any]:
    from grpo.run import hardware

    found = hardware.describe() | {"command": command}
    found.pop("threads")  # of this process; the contenders' number is in their sizes
    python = ROOT / vllm
    if python.exists():
        code = "from importlib.metadata import packages_distributions as p, version as v\n"
        code += "name = p()['vllm'][0]; print(name, v(name))"
        said = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False).stdout.split()
        found["versions"] |= dict([said]) if len(said) == 2 else {}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="in minutes; the numbers say nothing about speed")
    parser.add_argument("--only", nargs="+", choices=STEP_CONTENDERS, default=STEP_CONTENDERS, help="contenders")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--repeats", type=int, help="how often each contender is run (full: 3)")
    parser.add_argument("--threads", type=int, help="of every contender of the step (full: 2)")
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/peers.json, or runs/peers_small.json")
    parser.add_argument("--docs", type=Path, help="the page; default: docs/peers.md, and none with --small")
    parser.add_argument("--table", action="store_true", help="measure nothing; write the page from the JSON")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    out = args.json or ROOT / ("runs/peers_small.json" if args.small else "benchmarks/results/peers.json")
    docs = args.docs or (None if args.small else ROOT / "docs/peers.md")
    report = json.loads(out.read_text()) if out.exists() else {}
    if not args.table:
        form = SMALL if args.small else FULL
        form = replace(form, repeats=args.repeats or form.repeats)
        if args.threads:
            form = replace(form, step=replace(form.step, threads=args.threads))
        if not (ROOT / form.step.model / "config.json").exists() and "step" in args.parts:
            parser.error(f"{form.step.model} is not there; `make smollm2` prepares it")
        if "step" in args.parts:
            try:
                questions(form.step)  # from the hub into its cache, since contenders are offline
            except (ValueError, OSError) as error:
                parser.error(str(error))
        words = " ".join(["python -m benchmarks.peers", *sys.argv[1:]])
        sizes = {"step": asdict(form.step), "task": asdict(form.task), "repeats": form.repeats}
        here = described(words, form.step.vllm)
        alike = all(report.get("environment", {}).get(key) == here[key] for key in ("hardware", "versions"))
        before = report if alike and report.get("sizes") == sizes else {}
        report = dict(before)
        for part, found, seconds in measure(form, args.parts, args.only):
            spent = report.get("seconds_by_part", {}) | {part: seconds}
            report |= {
                part: found,
                "form": "small" if args.small else "full",
                "environment": here,
                "sizes": sizes,
                "configured": CONFIGURED,
                "seconds_by_part": spent,
                "seconds": round(sum(spent.values()), 1),
            }
            report["readme"] = [] if args.small else table.readme(report)
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(report, indent=1) + "\n")  # after every part: a late failure loses none
    text = table.page(report)
    if docs:
        docs.write_text(text)
    print(text)
    if report["readme"]:
        print("README's first screen takes:", *report["readme"], sep="\n  ")
    print(f"written to {out.relative_to(ROOT) if out.is_relative_to(ROOT) else out.name}; {report['seconds']:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())

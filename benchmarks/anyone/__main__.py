"""Planted faults in runs of TRL that `review.watch` records: what `quartet-review diagnose` says first, and two others.

    python -m benchmarks.anyone runs/anyone                      # teach the policies, train the runs, read them: 20 minutes
    python -m benchmarks.anyone runs/anyone --peers .anyone      # also rldoctor and rlprobe, installed in that environment
    python -m benchmarks.anyone runs/anyone --only "two BOS"     # one run, and nothing is written
    python -m benchmarks.anyone --table                          # the page again, from the JSON

A run that is there is not trained again. rldoctor reads the run's `trainer_state.json`, rlprobe records the same
training by its own callback. Each tool is called from its command line, and its seconds and memory are those of it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.anyone import page

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/anyone.json"
PAGE = ROOT / "docs/anyone.md"
TAUGHT = {"half": 500, "good": 800, "sure": 1600}  # steps
SEED = 1


def train(name: str, folder: Path, peers: Path | None) -> None:
    """Trains one run into FOLDER/runs. Its steps take seconds."""
    import torch

    from benchmarks.anyone.faults import setup_of
    from benchmarks.anyone.policy import teach
    from review.watch import watch

    torch.set_num_threads(1)
    policies = folder / "policies"
    for policy, steps in TAUGHT.items():
        if not (policies / policy / "config.json").exists():
            teach(policies / policy, steps)
    place = place_of(folder, name)
    trainer = watch(setup_of(name).build(policies, place, SEED))
    if peers:
        sys.path += map(str, peers.glob("lib/*/site-packages"))  # after ours: only what is missing comes from there
        from rlprobe.integrations.trl import attach

        attach(trainer, place / "rlprobe")
    trainer.train()
    trainer.save_state()


def place_of(folder: Path, name: str) -> Path:
    return folder / "runs" / "".join(letter if letter.isalnum() else "_" for letter in name)


def ours(place: Path, peers: Path | None) -> dict[str, Any]:
    out = place / "found.json"
    command = [sys.executable, "-m", "review", "diagnose", str(place / "watched"), "--json", str(out)]
    measured = _called(command)
    findings = json.loads(out.read_text())["findings"]
    said = [
        {"kind": each["kind"], "grave": each["severity"] != "note", "evidence": each["evidence"]} for each in findings
    ]
    return measured | {"said": said}


def rl_doctor(place: Path, peers: Path) -> dict[str, Any]:
    out = place / "rl_doctor.json"
    command = [peers / "bin/rl-doctor", "diagnose", place / "trainer_state.json", "--format", "json", "--output", out]
    measured = _called(list(map(str, command)))
    findings = json.loads(out.read_text())["findings"] if out.exists() else []
    order = ("CRITICAL", "WARNING", "INFO")  # of its report
    said = [
        {"kind": each["detector"], "grave": severity != "INFO", "evidence": each["summary"]}
        for severity in order
        for each in findings
        if each["severity"] == severity
    ]
    return measured | {"said": said}


def rlprobe(place: Path, peers: Path) -> dict[str, Any]:
    measured = _called([str(peers / "bin/rlprobe"), "doctor", str(place / "rlprobe"), "--json"])
    findings = json.loads(measured.pop("out") or "[]")
    findings = findings if isinstance(findings, list) else findings["findings"]
    said = [
        {"kind": each["signature_id"], "grave": each["severity"] != "info", "evidence": each["explanation"]}
        for each in findings
    ]
    return measured | {"said": said}


TOOLS = {"quartet": ours, "rl-doctor": rl_doctor, "rlprobe": rlprobe}


def _called(command: Sequence[str]) -> dict[str, Any]:
    """Seconds of the processor and peak memory of a command, which may end with any code."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, error = process.communicate()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"code": process.returncode, "seconds": round(seconds, 2), "out": out, "error": error[-400:]}


def read(names: Sequence[str], folder: Path, peers: Path | None) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in names:
        found = {}
        for tool, call in TOOLS.items():
            if tool == "quartet" or peers:
                found[tool] = call(place_of(folder, name), peers)
                found[tool].pop("out", None)
        yield name, found


def main() -> int:
    from benchmarks.anyone.faults import FAULTS, HONEST

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "runs/anyone", help="of policies and runs")
    parser.add_argument("--peers", type=Path, help="an environment with rldoctor and rlprobe")
    parser.add_argument("--only", nargs="+", help="these runs; nothing is written")
    parser.add_argument("--train", help=argparse.SUPPRESS)  # in a process of its own
    parser.add_argument("--table", action="store_true", help="read nothing; write the page from the JSON")
    args = parser.parse_args()
    if args.train:
        train(args.train, args.folder, args.peers)
        return 0
    if not args.table:
        names = args.only or [*FAULTS, *HONEST]
        for name in names:
            if not (place_of(args.folder, name) / "trainer_state.json").exists():
                _train_apart(name, args)
        runs = dict(read(names, args.folder, args.peers))
        report = {"environment": environment(args.peers), "runs": runs}
        if args.only:
            print(json.dumps(runs, indent=1))
            return 0
        RESULTS.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    report = json.loads(RESULTS.read_text(encoding="utf-8"))
    PAGE.write_text(page.page(report, FAULTS, list(HONEST)), encoding="utf-8")
    print(f"written to {RESULTS.relative_to(ROOT)} and {PAGE.relative_to(ROOT)}")
    return 0


def _train_apart(name: str, args: argparse.Namespace) -> None:
    """A fork has everything imported, and leaves nothing behind."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            train(name, args.folder, args.peers)
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(process, 0)
    if status:
        raise SystemExit(f"the run {name!r} failed")


def environment(peers: Path | None) -> Mapping[str, Any]:
    from importlib.metadata import version

    versions = {name: version(name) for name in ("trl", "transformers", "torch")}
    if peers:
        for folder in peers.glob("lib/*/site-packages/rl*.dist-info"):
            name, _, number = folder.name.removesuffix(".dist-info").partition("-")
            versions[name] = number
    return {"versions": versions, "steps": 32, "date": time.strftime("%Y-%m-%d")}


if __name__ == "__main__":
    sys.exit(main())

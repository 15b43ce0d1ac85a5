"""Planted faults in runs of TRL that `review.watch` records: what `quartet-review diagnose` and others say of them.

    make anyone                                    # everything, in 40 minutes
    python -m benchmarks.anyone runs/anyone        # teach the policies, train the runs, and read them
    python -m benchmarks.anyone --peers .anyone    # also rldoctor and rlprobe, installed in that environment
    python -m benchmarks.anyone --only "two BOS"   # one run, and nothing is written
    python -m benchmarks.anyone --table            # the page again, from the JSON

Every run is trained with two seeds, of its problems and of the training. The limits of our findings were chosen on the
runs of the first, `fitted`; nothing may be chosen on those of the second, `unseen`. A run that is there is not trained
again. rldoctor reads the run's `trainer_state.json`, rlprobe records the same
training by its own callback.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.anyone import page

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = ROOT / "benchmarks/results/anyone.json"
PAGE = ROOT / "docs/anyone.md"
TAUGHT = {"half": 500, "sure": 1600}  # steps
SEEDS = {"fitted": 1, "unseen": 23}


def train(name: str, which: str, folder: Path, peers: Path | None) -> None:
    """Trains one run into FOLDER/WHICH. Its steps take seconds."""
    import torch

    from benchmarks.anyone.faults import setup_of
    from benchmarks.anyone.policy import teach
    from review.watch import watch

    torch.set_num_threads(1)
    policies = folder / "policies"
    for policy, steps in TAUGHT.items():
        if not (policies / policy / "config.json").exists():
            teach(policies / policy, steps)
    place = place_of(folder, which, name)
    trainer = watch(setup_of(name, SEEDS[which]).build(policies, place))
    if peers:
        sys.path += map(str, peers.glob("lib/*/site-packages"))  # after ours: only what is missing comes from there
        from rlprobe.integrations.trl import attach

        attach(trainer, place / "rlprobe")
    trainer.train()
    trainer.save_state()


def place_of(folder: Path, which: str, name: str) -> Path:
    return folder / which / "".join(letter if letter.isalnum() else "_" for letter in name)


def ours(place: Path) -> dict[str, Any]:
    from review.findings.report import report

    began = time.process_time()
    findings = report(place / "watched").in_order
    said = [{"kind": each.kind, "grave": each.is_fault, "evidence": each.evidence} for each in findings]
    return {"said": said, "seconds": round(time.process_time() - began, 3)}


def read(names: Sequence[str], which: str, folder: Path, peers: Path | None) -> dict[str, Any]:
    """What each tool finds in each run of a seed, in the order of its report."""
    runs = {name: {"quartet": ours(place_of(folder, which, name))} for name in names}
    if peers:
        places = [str(place_of(folder, which, name)) for name in names]
        command = [str(peers / "bin/python"), str(HERE / "others.py"), *places]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        for name, line in zip(names, lines, strict=True):
            found = json.loads(line)
            runs[name] |= {tool: found[tool] for tool in ("rl-doctor", "rlprobe")}
    return runs


def commands(place: Path, peers: Path | None) -> dict[str, float]:
    """Seconds of the processor of each tool's command on a run, its start included."""
    each = {"quartet": [sys.executable, "-m", "review", "diagnose", place / "watched"]}
    if peers:
        each["rl-doctor"] = [peers / "bin/rl-doctor", "diagnose", place / "trainer_state.json"]
        each["rlprobe"] = [peers / "bin/rlprobe", "doctor", place / "rlprobe"]
    return {tool: _seconds(list(map(str, command))) for tool, command in each.items()}


def _seconds(command: Sequence[str]) -> float:
    """A finding is an exit code, too."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 2)


def main() -> int:
    from benchmarks.anyone.faults import FAULTS, HONEST

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "runs/anyone", help="of policies and runs")
    parser.add_argument("--peers", type=Path, help="an environment with rldoctor and rlprobe")
    parser.add_argument("--only", nargs="+", help="these runs; nothing is written")
    parser.add_argument("--table", action="store_true", help="read nothing; write the page from the JSON")
    args = parser.parse_args()
    if not args.table:
        names = args.only or [*FAULTS, *HONEST]
        runs = {}
        for which in SEEDS:
            for name in names:
                if not (place_of(args.folder, which, name) / "trainer_state.json").exists():
                    _train_apart(name, which, args)
            runs[which] = read(names, which, args.folder, args.peers)
        seconds = commands(place_of(args.folder, "fitted", names[0]), args.peers)
        machine = environment(args.peers)
        report = {"environment": machine, "seeds": SEEDS, "seconds_of_commands": seconds, "runs": runs}
        if args.only:
            print(json.dumps(runs, indent=1))
            return 0
        RESULTS.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    report = json.loads(RESULTS.read_text(encoding="utf-8"))
    PAGE.write_text(page.page(report, FAULTS, list(HONEST)), encoding="utf-8")
    print(f"written to {RESULTS.relative_to(ROOT)} and {PAGE.relative_to(ROOT)}")
    return 0


def _train_apart(name: str, which: str, args: argparse.Namespace) -> None:
    """A fork has everything imported, and leaves nothing behind."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            train(name, which, args.folder, args.peers)
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(process, 0)
    if status:
        raise SystemExit(f"the run {name!r} of the seed {SEEDS[which]} failed")


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

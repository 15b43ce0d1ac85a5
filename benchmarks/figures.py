"""Every figure anew, in pieces, and a page that says which committed figures are older than the code they measure.

    make figures                                  # the next piece, at most 40 minutes; again until none is left
    python -m benchmarks.figures --page           # docs/figures.md alone

A piece is due again when the code that it measures has changed: benchmarks/figures.json, which is committed with what
was measured, has the commit of each. One that is stopped goes on where it was.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

from benchmarks.peers.table import table

ROOT = Path(__file__).parents[1]
RESULTS, PAGE, DONE = ROOT / "benchmarks/results", ROOT / "docs/figures.md", ROOT / "benchmarks/figures.json"
PRODUCT = ("policies", "rollout", "rewards", "grpo")
MEASURED = {"rollout": PRODUCT[:2], "compiled": PRODUCT[:2], "learner": ("policies", "grpo/learner", "grpo/algorithm")}
PIECES = {  # the words after `python`
    **{f"peers, {part}": f"-m benchmarks.peers --parts {part}" for part in ("step", "task", "mistakes")},
    "rollouts": "benchmarks/rollout.py --dtype bfloat16 --vllm .vllm/bin/python --rows 1,8,32 --tokens 64 --repeats 5 "
    "--only vllm --only 'ours graphs' --json benchmarks/results/rollout_vllm.json",
    "learner": "benchmarks/learner.py --dtype bfloat16 --steps 1 --contenders trl ours_dense ours_dense_small "
    "--json benchmarks/results/learner_bf16.json",
    "learning": "-m benchmarks.learn --tasks words spelling",
    **{f"demo, seed {seed}": f"-m benchmarks.figures --demo {seed}" for seed in range(5)},
}
BEFORE = """# Which figures are older than their code

`make figures` measures the next piece anew, in at most 40 minutes, and writes this page; repeat it until none is left.
Each JSON is in `benchmarks/results/`. A commit to the code need not change a figure, but nobody has looked since.

"""


def git(*words: str, root: Path = ROOT) -> str:
    return subprocess.run(["git", *words], cwd=root, check=True, capture_output=True, text=True).stdout.strip()


def code_of(command: str, root: Path = ROOT) -> list[str]:
    """The files that a command measures with, and what it measures; none where its script is gone."""
    found = re.search(r"-m benchmarks\.(\w+)|(\w+)\.py\b|\bmake (\w+)", command)
    script = next(filter(None, found.groups()), "") if found else ""
    there = [name for name in (f"benchmarks/{script}.py", f"benchmarks/{script}") if script and (root / name).exists()]
    return [*there, *MEASURED.get(script, PRODUCT)] if there or re.search(r"\bquartet |-m grpo ", command) else []


def row_of(file: Path, root: Path = ROOT) -> tuple[str, str, int | None, str]:
    """Its name, the day, how many commits its code had since then (None: its script is gone), its command."""
    found = re.search(r'"command": ?"((?:[^"\\]|\\.)*)"', file.read_text(encoding="utf-8"))
    command = json.loads(f'"{found[1]}"') if found else ""
    if git("status", "--porcelain", "--", str(file), root=root):
        return file.name, "not committed yet", 0, command
    commit, day = git("log", "-1", "--format=%H %cs", "--", str(file), root=root).split()
    code = code_of(command, root)
    since = int(git("rev-list", "--count", f"{commit}..HEAD", "--", *code, root=root)) if code else None
    return file.name, day, since, command


def page(rows: list[tuple[str, str, int | None, str]]) -> str:
    """Those with the most commits since come first, and those whose script is gone last."""
    lines = []
    for name, day, since, command in sorted(rows, key=lambda row: (row[2] is None, -(row[2] or 0), row[0])):
        words = command.replace("./.venv/bin/", "").replace("|", "/").split()
        shown = f"`{' '.join(words[:4])}{' ...' if words[4:] else ''}`"
        lines.append([name, day, *(["its script is in the history", ""] if since is None else [str(since), shown])])
    return BEFORE + table(("figure", "measured", "commits to its code since", "its command"), lines)


def state_of(piece: str) -> str:
    return git("log", "-1", "--format=%H", "--", *code_of(PIECES[piece]))


def measure(words: str) -> bool:
    """Returns whether a piece has ended as a whole. After 40 minutes it gets what Ctrl-C sends."""
    command = ["timeout", "--foreground", "--signal=INT", "40m", sys.executable, "-u", *shlex.split(words)]
    said = ""
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for said in process.stdout or ():
            print(said, end="", flush=True)
    return process.returncode == 0 and "the same command goes on" not in said


def demo(seed: int) -> None:
    """Runs the demo and its controls, or what is left of them, and adds what the controls say to demo.json."""
    from grpo.cli.parse import main as quartet

    folder, file = ROOT / f"runs/figures/demo-{seed}-{state_of(f'demo, seed {seed}')[:8]}", RESULTS / "demo.json"
    words = ["train", "examples/01_demo.yaml", "--seed", str(seed), "--output_dir", str(folder), "--resume", "auto"]
    for command in (words, ["control", str(folder)]):  # in this process, which gets what stops it
        if code := quartet(command):
            raise SystemExit(code)
    seeds = json.loads(file.read_text())["seeds"] if file.exists() else {}
    seeds[str(seed)] = json.loads((folder / "control/control.json").read_text())
    file.write_text(json.dumps({"command": "make figures", "seeds": seeds}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.figures", description=__doc__.partition("\n")[0])
    parser.add_argument("--page", action="store_true", help="write the page alone")
    parser.add_argument("--demo", type=int, metavar="SEED", help="one run of the demo")
    asked = parser.parse_args()
    if asked.demo is not None:
        return demo(asked.demo)
    done = json.loads(DONE.read_text()) if DONE.exists() else {}
    left = [piece for piece in PIECES if done.get(piece) != state_of(piece)]
    if left and not asked.page and measure(PIECES[left[0]]):
        DONE.write_text(json.dumps(done | {left[0]: state_of(left[0])}, indent=1) + "\n")
        left = left[1:]
    print(f"left: {'; '.join(left) or 'nothing'}; `make figures` goes on")
    PAGE.write_text(page([row_of(file) for file in sorted(RESULTS.glob("*.json"))]), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Does a hostile reward end the trainer, fill its memory or its terminal? One process for each attack.

Two prompts with two completions each are scored three times, and one of the four completions sets the attack off. The
last line of an attack that is contained is the rewards of the last call: its own completion has none.

    python benchmarks/attacks/rewards.py [--tree ANOTHER_CHECKOUT]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from measure import TREE, table

SCORE = """
import sys
from rewards import RewardSpec, Scorer
with Scorer([RewardSpec(sys.argv[1])], on_error="drop_sample", timeout_s=2) as scorer:
    for _ in range(3):
        texts = [["fine", "attack"], ["fine", "fine"]]
        groups = scorer.score(["p", "q"], texts, [{}, {}], prompt_ids=["a", "b"])
    scorer.close()
    print(file=sys.stderr)
    print([group.rewards for group in groups], *groups[0].errors[:1])
"""
FILE = """
import gc, os, re, signal, socket, stat, sys, threading, time
def sockets():
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                found.append(int(name))
        except OSError:
            pass
    return found
def write(data):
    for fd in sockets():
        os.write(fd, data)
def stream():
    while True:
        write(b"x" * (1 << 20))
def attack():
    {body}
def grade(completions, **_):
    if "attack" in completions:
        attack()
    return [1.0] * len(completions)
"""
ATTACKS = {
    "writes what is no JSON into its socket": "write(b'nonsense\\n')",
    "writes half a line into its socket": "write(b'{\"rewards\": [')",
    "writes an answer of another form": "write(b'{\"rewards\": 7}\\n')",
    "writes a list": "write(b'[1]\\n')",
    "writes an answer with too few rewards": "write(b'{\"rewards\": [9.0]}\\n'); time.sleep(1)",
    "writes rewards that are texts": 'write(b\'{"rewards": ["a", "b"]}\\n\'); time.sleep(1)',
    "writes 100,000 brackets": "write(b'[' * 100_000 + b'\\n')",
    "writes bytes that are no UTF-8": "write(b'\\xff\\xfe\\n')",
    "writes without an end": "stream()",
    "writes signatures": "write(b'{\"signatures\": []}\\n')",
    "closes all files": "os.closerange(0, 1000)",
    "closes its socket": "[os.close(fd) for fd in sockets()]; time.sleep(9)",
    "raises KeyboardInterrupt": "raise KeyboardInterrupt",
    "raises GeneratorExit": "raise GeneratorExit",
    "sends SIGINT to itself": "os.kill(os.getpid(), signal.SIGINT); time.sleep(9)",
    "prints escapes": "print('\\x1b]0;owned\\x07\\x1b[2J')",
    "prints 200 MB": "[print('y' * 1000) for _ in range(200_000)]",
    "prints 200 MB to the descriptor 2": "[os.write(2, b'y' * 1000) for _ in range(200_000)]",
    "prints from a thread without an end": "threading.Thread(target=lambda: [print('z' * 1000) for _ in iter(int, 1)],"
    " daemon=True).start()",
    "prints one line without an end": "[sys.stdout.write('y' * 1000) for _ in iter(int, 1)]",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, default=TREE, help="the checkout that is attacked")
    parser.add_argument("--only", default="", help="part of the name of an attack")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        attacks = []
        for number, (name, body) in enumerate(ATTACKS.items()):
            file = Path(folder, f"attack_{number}.py")
            file.write_text(FILE.replace("{body}", body))
            if args.only in name:
                attacks.append((name, ["-c", SCORE, f"{file}:grade"]))
        table(attacks, args.tree)


if __name__ == "__main__":
    main()

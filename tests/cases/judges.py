"""A judge on loopback: an OpenAI-compatible endpoint whose answers a test chooses."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from local_server import serving

TOKENS = 10  # of every answer


def verdict(score, reason="because", tokens=TOKENS):
    """The body of an answer as OpenAI writes it; `score` may be any text that a broken judge says."""
    content = score if isinstance(score, str) else json.dumps({"reason": reason, "score": score})
    return {"choices": [{"message": {"content": content}}], "usage": {"total_tokens": tokens}}


class _Endpoint(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        asked = body["messages"][-1]["content"]
        with self.server.lock:
            self.server.seen.append((self.path, dict(self.headers), body))
            script = self.server.script.get(asked)
            answer = script.pop(0) if script else None
        answer = self.server.answer(asked) if answer is None else answer
        status, headers, said = answer if isinstance(answer, tuple) else (200, {}, answer)
        if isinstance(said, float):  # late
            time.sleep(said)
            said = verdict(1.0)
        text = json.dumps(said).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(text)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


class _Server(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True

    def handle_error(self, *_):  # a client that did not wait
        pass


@contextmanager
def judge_server(answer=lambda asked: verdict(1.0), script=()):
    """`script` has, by what the judge is asked, a list of answers that come first: a body, a delay in seconds, or
    (status, headers, body)."""
    server = _Server(("127.0.0.1", 0), _Endpoint)
    server.answer, server.script, server.seen, server.lock = answer, dict(script), [], threading.Lock()
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    with serving(server):
        yield server

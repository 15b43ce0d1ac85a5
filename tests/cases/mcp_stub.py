"""An MCP server in plain Python, which starts at once and can fail in many ways: by stdio, or by HTTP (`http_server`).

It speaks the protocol of 2025-06-18 (modelcontextprotocol.io/specification/2025-06-18), as far as tools need it.
"""

import json
import os
import signal
import sys
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from local_server import serving


def tool(name, required=(), **properties):
    schema = {"type": "object", "properties": properties, "required": list(required)}
    return {"name": name, "description": f"Does {name}.", "inputSchema": schema}


NUMBER, TEXT = {"type": "integer", "description": "Any."}, {"type": "string"}
TOOLS = [
    tool("add", ["a", "from"], a=NUMBER, **{"from": {"anyOf": [{"type": "integer"}, {"type": "null"}]}}),
    tool("count"),
    tool("echo", text=TEXT),
    tool("fail", how=TEXT | {"enum": ["error", "wrong", "odd", "long", "hang", "die", "cut", "twice", "mute"]}),
]


class Server:
    """The answers of one session; `counted` is its state."""

    def __init__(self):
        self.counted = 0

    def answer(self, request):
        method, about = request["method"], {"jsonrpc": "2.0", "id": request["id"]}
        if method == "initialize":
            told = {"name": "stub", "version": "1"}
            version = {"protocolVersion": "2025-06-18", "capabilities": {"tools": {}}, "serverInfo": told}
            return about | {"result": version}
        if method == "tools/list":  # in two pages
            page = (request.get("params") or {}).get("cursor")
            return about | {"result": {"tools": TOOLS[2:]} if page else {"tools": TOOLS[:2], "nextCursor": "2"}}
        if method == "tools/call":
            return about | self.called(request["params"]["name"], request["params"].get("arguments") or {})
        return about | {"error": {"code": -32601, "message": f"no method {method}"}}

    def called(self, name, arguments):
        if name == "count":
            self.counted += 1
        how = arguments.get("how")
        if how == "wrong":
            return {"error": {"code": -32602, "message": "these arguments are wrong"}}
        if how == "odd":
            return {"error": {"code": -32603, "message": "out of paper"}}
        if how == "hang":
            time.sleep(60)
        said = {
            "add": lambda: str(arguments["a"] + arguments["from"]),
            "count": lambda: str(self.counted),
            "echo": lambda: arguments.get("text", "nothing"),
            "fail": lambda: "x" * 1_000_001 if how == "long" else "it failed",
        }[name]()
        return {"result": {"content": [{"type": "text", "text": said}], "isError": how == "error"}}


def stdio():
    """`--deaf` goes on when nobody can ask any more, and heeds no SIGTERM; `--pid FILE` tells its process."""
    if "--deaf" in sys.argv:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if "--pid" in sys.argv:
        with open(sys.argv[sys.argv.index("--pid") + 1], "a") as file:
            file.write(f"{os.getpid()}\n")
    server = Server()
    for line in sys.stdin:
        request = json.loads(line)
        if "id" not in request:
            continue
        how = (request.get("params") or {}).get("arguments", {}).get("how")
        if how == "die":
            os._exit(3)
        text = json.dumps(server.answer(request))
        if how == "cut":
            text = text[: len(text) // 2]
        print(f"{text}\n{text}" if how == "twice" else text, flush=True)
    while "--deaf" in sys.argv:
        time.sleep(1)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        how = (request.get("params") or {}).get("arguments", {}).get("how")
        self.server.asked.append(request.get("method"))
        answers = [b""] if "id" not in request else [json.dumps(self.server.own.answer(request)).encode()]
        status = 202 if "id" not in request else 429 if how == "mute" else 200
        if how == "die":
            self.close_connection = True
            return
        body = {"cut": answers[0][:40], "twice": answers[0] * 2}.get(how, answers[0])
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.send_response(405)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_DELETE = do_GET

    def log_message(self, *_):
        pass


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False


@contextmanager
def http_server():
    """On loopback; all sessions share its state, and `asked` has the methods of the requests."""
    server = _Http(("127.0.0.1", 0), _Handler)
    server.own, server.asked = Server(), []
    server.url = f"http://127.0.0.1:{server.server_port}/mcp"
    with serving(server):
        yield server


if __name__ == "__main__":
    stdio()

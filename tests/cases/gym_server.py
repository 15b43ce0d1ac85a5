"""A resources server on loopback in the form of NeMo-Gym (nemo_gym/base_resources_server.py of NVIDIA-NeMo/Gym)."""

import json
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from local_server import serving


class _Server(BaseHTTPRequestHandler):
    """It seeds a session under a cookie, and answers /verify with the row, the response and a reward."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, self.headers.get("Cookie"), body))
        status, answer = (200, {}) if self.path == "/seed_session" else self.server.verify(body)
        text = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        if self.path == "/seed_session":
            self.send_header("Set-Cookie", f"session=of-{body['id']}; path=/")
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


@contextmanager
def gym_server(verify):
    """`verify` gives the status and the answer to the body of /verify."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Server)
    server.verify, server.seen, server.url = verify, [], f"http://127.0.0.1:{server.server_port}"
    with serving(server):
        yield server

"""The address that a command listens on."""

from __future__ import annotations

import socket


def listen(host: str, port: int) -> tuple[socket.socket, str]:
    """A socket that listens there, and its address such as `127.0.0.1:8000`; port 0 takes one that is free.

    Raises OSError, which names the options, where the address cannot be listened on.
    """
    try:
        listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(128)  # whoever opens the address at once waits for the server
    except OSError as error:
        raise OSError(f"--host {host} --port {port}: cannot listen there ({error.strerror or error})") from error
    shown = f"[{host}]" if ":" in host else host
    return listening, f"{shown}:{listening.getsockname()[1]}"

"""A port that is chosen for another program, which binds it later."""

import socket

import pytest

from grpo.run.listening import keep, listen


def test_a_port_that_is_kept_goes_to_a_server_that_shares_it_and_to_nobody_else():
    kept, address = keep("127.0.0.1", 0)
    host, port = address.split(":")
    with kept, socket.socket() as server:
        with pytest.raises(OSError, match=f"--host 127.0.0.1 --port {port}: cannot listen there"):
            listen(host, int(port))
        for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):  # both of them, as vLLM
            server.setsockopt(socket.SOL_SOCKET, option, 1)
        server.bind((host, int(port)))
        server.listen()
        with socket.create_connection((host, port), timeout=10) as sent:
            assert server.accept()[1] == sent.getsockname()


def test_a_port_that_was_named_is_tried():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="cannot listen there"):
        keep(*taken.getsockname())

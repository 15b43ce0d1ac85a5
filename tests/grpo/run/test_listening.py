"""A port that is chosen for another program, which binds it later."""

import socket

import pytest

from grpo.run.listening import find_address


def test_a_port_that_was_found_goes_to_a_server_that_shares_it_with_nobody():
    host, port = find_address("127.0.0.1", 0).split(":")
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # alone, as vLLM
        server.bind((host, int(port)))
        server.listen()
        with socket.create_connection((host, port), timeout=10) as sent:
            assert server.accept()[1] == sent.getsockname()


def test_a_port_that_was_named_is_tried():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="cannot listen there"):
        find_address(*taken.getsockname())

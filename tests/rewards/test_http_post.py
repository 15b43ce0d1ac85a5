"""A POST is tried again after an error answer whose text never comes."""

import socket
import threading

from rewards.http_post import Tries, post

STALLS = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 100\r\n\r\nbusy"
ANSWERS = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"


def test_an_error_answer_that_stalls_is_tried_again():
    with socket.create_server(("127.0.0.1", 0)) as server:
        kept = []

        def serve():
            for answer in (STALLS, ANSWERS):
                connection, _ = server.accept()
                connection.recv(65536)
                connection.sendall(answer)
                kept.append(connection)  # open: the rest of the text is awaited

        thread = threading.Thread(target=serve)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/"
        assert post(url, b"{}", bytes.decode, Tries(request_timeout_s=0.3, retries=1, backoff_s=0.01)) == "ok"
        thread.join()
        for connection in kept:
            connection.close()

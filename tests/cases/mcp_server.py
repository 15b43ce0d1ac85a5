"""An MCP server, built with the official SDK: by stdio as a program, or by streamable HTTP on loopback (`http`)."""

import socket
import subprocess
import sys
from contextlib import contextmanager


def build():
    from mcp.server import MCPServer
    from mcp.server.mcpserver.exceptions import ToolError  # of any other exception the client gets no word
    from mcp.types import CallToolResult

    server = MCPServer("finding")
    counted = {"calls": 0}

    @server.tool()
    def find(word: str, loudly: bool = False) -> str:
        """Finds a word."""
        if not word:
            raise ToolError("no such word")
        counted["calls"] += 1
        text = f"{word} is here: {counted['calls']}"
        return text.upper() if loudly else text

    @server.tool()
    def place(name: str) -> CallToolResult:
        """Gives structured content alone."""
        return CallToolResult(content=[], structured_content={"row": 3, "name": name})

    return server


@contextmanager
def http():
    """Serves in a process of its own, and gives its address."""
    with socket.create_server(("127.0.0.1", 0)) as listening:  # whoever connects before it serves waits for it
        port, number = listening.getsockname()[1], listening.fileno()
        server = subprocess.Popen([sys.executable, __file__, str(number)], pass_fds=[number])
    try:
        yield f"http://127.0.0.1:{port}/mcp"
    finally:
        server.kill()
        server.wait()


if __name__ == "__main__":
    if len(sys.argv) == 1:
        build().run()
    else:
        import uvicorn

        listening = socket.socket(fileno=int(sys.argv[1]))
        uvicorn.Server(uvicorn.Config(build().streamable_http_app(), log_level="warning")).run(sockets=[listening])

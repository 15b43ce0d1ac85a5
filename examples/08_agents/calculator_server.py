"""An MCP server with a calculator (pip install mcp), at http://127.0.0.1:8000/mcp while this runs."""

from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

from rollout.environments.calculator import evaluate

server = MCPServer("calculator")


@server.tool()
def calculate(expression: str) -> str:
    """Evaluates an arithmetic expression, such as 48/2."""
    try:
        return evaluate(expression)
    except ValueError as error:
        raise ToolError(f"error: {error}") from error


if __name__ == "__main__":
    server.run(transport="streamable-http")

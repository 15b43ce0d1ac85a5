"""A client of MCP (pip install mcp openai), which offers the policy the tools of the server beside this file. It is
trained by `quartet train HERE/train.yaml --agent HERE/mcp_client.py:solve`, where HERE is this folder, while
`python HERE/calculator_server.py` runs."""

import json

from mcp import Client, MCPError
from openai import AsyncOpenAI

SERVER = "http://127.0.0.1:8000/mcp"


async def solve(base_url: str, api_key: str, question: str) -> None:
    async with Client(SERVER) as server, AsyncOpenAI(base_url=base_url, api_key=api_key) as policy:
        functions = [
            {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
            for tool in (await server.list_tools()).tools
        ]
        tools = [{"type": "function", "function": function} for function in functions]
        messages = [{"role": "user", "content": question}]
        for _ in range(6):
            answer = await policy.chat.completions.create(model="policy", messages=messages, tools=tools)
            message = answer.choices[0].message
            if not message.tool_calls:
                return
            messages.append(message)
            for call in message.tool_calls:
                text = await called(server, call.function.name, json.loads(call.function.arguments))
                messages.append({"role": "tool", "tool_call_id": call.id, "content": text})


async def called(server: Client, name: str, arguments: dict) -> str:
    """What the tool answers, or why it has refused."""
    try:
        result = await server.call_tool(name, arguments)
    except MCPError as error:
        return f"error: {error}"
    return "\n".join(part.text for part in result.content)

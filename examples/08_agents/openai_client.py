"""A loop of one's own over OpenAI's client (pip install openai), as it would run with any other server:
`quartet train examples/08_agents/train.yaml`."""

import json

from openai import DefaultHttpxClient, OpenAI

from rollout.environments.calculator import evaluate

CONNECTIONS = DefaultHttpxClient()  # making a new one for each problem would take longer than its answer
PARAMETERS = {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]}
TOOL = {"name": "calculate", "description": "Evaluates an arithmetic expression.", "parameters": PARAMETERS}


def calculate(arguments: str) -> str:
    try:
        return evaluate(json.loads(arguments)["expression"])
    except (KeyError, TypeError, ValueError) as error:
        return f"error: {error}"


def solve(base_url: str, api_key: str, question: str) -> None:
    client = OpenAI(base_url=base_url, api_key=api_key, http_client=CONNECTIONS)
    messages = [{"role": "user", "content": question}]
    for _ in range(6):
        answer = client.chat.completions.create(
            model="policy", messages=messages, tools=[{"type": "function", "function": TOOL}]
        )
        message = answer.choices[0].message
        if not message.tool_calls:
            return
        messages.append(message)
        for call in message.tool_calls:
            result = calculate(call.function.arguments)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})

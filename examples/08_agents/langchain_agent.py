"""An agent of LangChain (pip install langchain langchain-openai), as it would run with any other server. It is trained
by `quartet train HERE/train.yaml --agent HERE/langchain_agent.py:solve`, where HERE is this folder."""

from contextlib import suppress

from langchain.agents import create_agent
from langchain_openai import ChatOpenAI
from langgraph.errors import GraphRecursionError

from rollout.environments.calculator import evaluate


def calculate(expression: str) -> str:
    """Evaluates an arithmetic expression, such as 48/2."""
    try:
        return evaluate(expression)
    except ValueError as error:
        return f"error: {error}"


def solve(base_url: str, api_key: str, question: str) -> None:
    model = ChatOpenAI(model="policy", base_url=base_url, api_key=api_key)
    agent = create_agent(model, [calculate])
    with suppress(GraphRecursionError):  # what the policy wrote is learned from all the same
        agent.invoke({"messages": [("user", question)]}, {"recursion_limit": 12})

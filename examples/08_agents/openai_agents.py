"""An agent of OpenAI's SDK openai-agents (pip install openai-agents), as it would run with any other server. It is
trained by `quartet train HERE/train.yaml --agent HERE/openai_agents.py:solve`, where HERE is this folder."""

from contextlib import suppress

from agents import Agent, ModelBehaviorError, OpenAIChatCompletionsModel, Runner, function_tool, set_tracing_disabled
from agents.exceptions import MaxTurnsExceeded
from openai import AsyncOpenAI

from rollout.environments.calculator import evaluate

set_tracing_disabled(True)  # it would send traces to OpenAI


@function_tool
def calculate(expression: str) -> str:
    """Evaluates an arithmetic expression, such as 48/2."""
    return evaluate(expression)


async def solve(base_url: str, api_key: str, question: str) -> None:
    async with AsyncOpenAI(base_url=base_url, api_key=api_key) as client:
        model = OpenAIChatCompletionsModel("policy", client)
        agent = Agent(name="solver", model=model, tools=[calculate])
        with suppress(MaxTurnsExceeded, ModelBehaviorError):  # what the policy wrote is learned from all the same
            await Runner.run(agent, question, max_turns=6)

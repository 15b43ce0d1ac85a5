"""A program that solves a word problem by OpenAI's API, as it would with any other server. It asks, and where the
answer has no number it asks once more, in the same text. `quartet train examples/11_agent.yaml` learns from both."""

import re

from openai import DefaultHttpxClient, OpenAI

CONNECTIONS = DefaultHttpxClient()  # making a new one for each problem would take longer than its answer


def solve(base_url: str, api_key: str, prompt: str) -> None:
    client = OpenAI(base_url=base_url, api_key=api_key, http_client=CONNECTIONS)

    def ask(text: str) -> str:
        return client.completions.create(model="policy", prompt=text).choices[0].text

    answer = ask(prompt)
    if not re.search(r"#### *-?\d", answer):
        ask(f"{prompt}{answer}\n{prompt}")

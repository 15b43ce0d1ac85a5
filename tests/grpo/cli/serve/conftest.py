"""A micro policy with a chat template, and a server of it that tests share."""

import pytest
import torch
from serving_cases import Running

torch.set_num_threads(1)
CHAT = (
    "{% if tools %}tools: {{ tools | tojson }}{{ '\n' }}{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for call in m.tool_calls or [] %}<<{{ call.function.arguments.x }}={% endfor %}{{ '\n' }}{% endfor %}"
)


@pytest.fixture(scope="package")
def model(random_policy, tmp_path_factory) -> str:
    policy = random_policy(3)
    policy.tokenizer.chat_template = CHAT
    folder = tmp_path_factory.mktemp("policies") / "micro"
    policy.save(folder)
    return str(folder)


@pytest.fixture(scope="package")
def running(model):
    server = Running(model)
    yield server
    server.end()

"""A chat template gives what transformers gives, and one that takes time or memory without end is refused."""

from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from rewards.isolation import chat_template
from rewards.isolation.chat_template import render
from rewards.isolation.pool import WorkerPool

TEMPLATES = Path(find_spec("trl").submodule_search_locations[0], "chat_templates")
TALK = [
    {"role": "system", "content": "Be brief.", "name": None},
    {"role": "user", "content": "é \ud83d <2 + 3>"},
    {"role": "assistant", "content": "5"},
    {"role": "user", "content": "and 4?"},
]
WEATHER = {"name": "weather", "description": "The weather.", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": WEATHER}]


@pytest.fixture(scope="module")
def tokenizer():
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<s>": 0}, "<s>")), bos_token="<s>")


@pytest.fixture(scope="module")
def impatient():
    pool = WorkerPool([{"kind": "template", "function": "t"}], size=1, timeout_s=2.0, memory=chat_template.MEMORY)
    yield pool
    pool.close()


def raised(call) -> str:
    try:
        return call()
    except Exception as error:
        return "an error: " + str(error).removeprefix("TemplateError: ")


@pytest.mark.parametrize("name", ["qwen3", "llama3_1", "gemma", "deepseekv3", "phi3", "gptoss", "qwen3_training"])
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_it_is_what_transformers_gives(tokenizer, name, tools):
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
    options = {"add_generation_prompt": True, "enable_thinking": False}
    usual = raised(lambda: tokenizer.apply_chat_template(TALK, tools, tokenize=False, **options))
    assert raised(lambda: render(tokenizer, TALK, tools, **options)) == usual
    assert usual.startswith("an error") == (name == "gemma")  # it knows no system message


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ 'a' * 10**10 }}", "it needs more memory than its process may have"),
        ("{{ 'a' * 10**7 }}", "it makes 10,000,000 letters of them; 1,00"),
        ("{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}", "RecursionError"),
        pytest.param(
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "no result after 2 s",
            marks=pytest.mark.slow,
        ),
        ("{% if messages[0].content == 'Be brief.' %}{{ 'a' * 10**10 }}{% endif %}x", "it needs more memory"),
    ],
    ids=["text", "much", "brackets", "loops", "one-message"],
)
def test_one_without_end_is_refused_and_this_process_stays_small(tokenizer, impatient, monkeypatch, template, said):
    monkeypatch.setattr(chat_template, "_pool", lambda: impatient)
    tokenizer.chat_template, before = template, psutil.Process().memory_info().rss
    with pytest.raises(ValueError, match=said):
        render(tokenizer, TALK)
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert render(tokenizer, TALK) == "Be brief."
    assert psutil.Process().memory_info().rss < before + (64 << 20)

"""How families of models write calls, for chat templates that TRL does not know word for word.

Each form is a response template of transformers (docs/source/en/chat_response_parsing.md there), and is chosen by a
mark that the chat template writes. Those of Qwen, Hermes, GLM, LFM and Gemma 4 are TRL's. Llama's and DeepSeek's forms
are in vllm-project/vllm, vllm/entrypoints/openai/tool_parsers/llama_tool_parser.py, deepseekv3_tool_parser.py and
deepseekv31_tool_parser.py; FunctionGemma's is in the model's own documentation.
"""

from __future__ import annotations

from typing import Any

from trl.chat_template_utils import (
    gemma4_template,
    glm4moe_template,
    lfm2_2_5_template,
    qwen3_5_template,
    qwen3_template,
)


def _form(anchor: str, opening: str, closing: str, end: str, **arguments: object) -> dict[str, Any]:
    """Returns a response template in which a call is named in `opening`, and its JSON goes up to `closing`."""
    call = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
    calls = {"open_pattern": opening, "close_pattern": closing, "repeats": True, "content": "json", "transform": call}
    fields = {"tool_calls": calls | {"content_args": arguments}, "content": {"close_pattern": end, "content": "text"}}
    return {"defaults": {"role": "assistant"}, "start_anchor_pattern": anchor, "fields": fields}


LLAMA = _form(
    r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n",
    r'(?:<\|python_tag\|>)?\{\s*"name":\s*"(?P<name>[^"]*)",\s*"parameters":\s*',
    r"\}\s*(?:<\|eo[tm]_id\|>\s*|$)",
    r"<\|eo[tm]_id\|>\s*",
)
DEEPSEEK = _form(  # V3 and R1 write `function<sep>NAME`, a line break and fenced JSON; V3.1 writes `NAME<sep>` and JSON
    "<｜Assistant｜>(?:</?think>\n?)?",
    "(?:<｜tool▁calls▁begin｜>)?<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>)?(?P<name>[^\n<]*)(?:\n```json|<｜tool▁sep｜>)?",
    r"(?:```)?<｜tool▁call▁end｜>\s*(?:<｜tool▁calls▁end｜>)?",
    r"<｜end▁of▁sentence｜>\s*",
)
FUNCTION_GEMMA = _form(
    r"<start_of_turn>model\n",
    r"<start_function_call>call:(?P<name>[^{<]*)",
    r"<end_function_call>\s*",
    r"(?:<end_of_turn>|<start_function_response>)\s*",
    string_delims=[["<escape>", "<escape>"]],
    unquoted_keys=True,
)
FAMILIES = {  # by the mark, the more special one first
    "<start_function_call>": FUNCTION_GEMMA,
    "<|tool_call>call:": gemma4_template,
    "<｜tool▁call▁begin｜>": DEEPSEEK,
    "<|tool_call_start|>": lfm2_2_5_template,
    "<arg_key>": glm4moe_template,
    "<function=": qwen3_5_template,
    "<tool_call>": qwen3_template,
    "<|start_header_id|>": LLAMA,
}


def template_of(chat_template: str) -> dict[str, Any] | None:
    """Returns the form of the family whose mark the chat template has; None where it has none of them."""
    return next((form for mark, form in FAMILIES.items() if mark in chat_template), None)

"""What is wrong with the prompts of a trainer before anything is learned: its chat template, its stop tokens and its
first prompts, as `review.watch` sees them. A tokenizer is one of transformers; nothing of it is imported here."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rewards.finding import Finding, found

MARKER = re.compile(r"<\|[^|<>\s]{1,30}\|>")
QUESTION, ANSWER = "What is 1 + 1?", "quartets answer"


def of_template(tokenizer: Any, template: str | None, stops: Collection[int]) -> list[Finding]:
    """What a rendered turn shows. `template` is the trainer's own, else the tokenizer's is used; without either there
    is nothing to look at. `stops` are the ids that end a completion."""
    if not (template or getattr(tokenizer, "chat_template", None)):
        return []

    def rendered(*said: str, **options: Any) -> str:
        roles = ("user", "assistant")
        messages = [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]
        return str(tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **options))

    prompt = rendered(QUESTION, add_generation_prompt=True)
    findings = _of_generation_prompt(prompt, rendered(QUESTION), rendered(QUESTION, ANSWER))
    findings += _of_markers(prompt, tokenizer)
    return findings + _of_stop(rendered(QUESTION, ANSWER), tokenizer, stops)


def _of_generation_prompt(prompt: str, closed: str, answered: str) -> list[Finding]:
    """Some templates have nothing before an answer. Where they have, a prompt needs it at its end."""
    header = answered.partition(ANSWER)[0].removeprefix(prompt)
    if prompt != closed or not header.strip():
        return []
    what = f"An answer begins with {header!r}, and the prompts of the template do not end with it."
    return [found("generation-prompt", what)]


def _of_markers(prompt: str, tokenizer: Any) -> list[Finding]:
    known = tokenizer.get_vocab()
    unknown = sorted({mark for mark in MARKER.findall(prompt) if mark not in known})
    if not unknown:
        return []
    what = f"The chat template writes {unknown[0]}, which is not a token of this tokenizer: it is cut in pieces."
    change = "use the chat template that the model was trained with"
    return [found("template", what, change=change)]


def _of_stop(answered: str, tokenizer: Any, stops: Collection[int]) -> list[Finding]:
    """The first special token after an answer is what the policy has learned to end with."""
    end = answered.rpartition(ANSWER)[2]
    special = {tokenizer.convert_tokens_to_ids(mark): mark for mark in tokenizer.get_added_vocab()}
    ids = [token for token in tokenizer(end, add_special_tokens=False)["input_ids"] if token in special]
    if not ids or set(ids) & set(stops):
        return []
    named = ", ".join(str(tokenizer.convert_ids_to_tokens(token)) for token in stops)
    what = f"In the chat template an answer ends with {special[ids[0]]}, and completions stop at {named} only."
    return [found("stop-and-pad", what)]


def of_prompts(tokenizer: Any, rows: Sequence[Mapping[str, Any]], lines: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """What the first prompts show: `rows` of the data, and the `lines` of the record with the ids of the prompts."""
    findings = []
    begin, special = tokenizer.bos_token_id, set(tokenizer.all_special_tokens)
    twice = [line["prompt_id"] for line in lines if begin is not None and line["prompt_ids"][:2] == [begin] * 2]
    if twice:
        what = f"{len(twice)} of {len(lines)} prompts begin with {tokenizer.bos_token} twice."
        findings.append(found("begins-twice", what, sorted(set(twice))))
    marked = [mark for row in rows for mark in _marks_in(row.get("prompt"), special)]
    if marked:
        what = f"Messages hold {marked[0]}, which the chat template writes as well."
        findings.append(found("template-twice", what))
    return findings


def _marks_in(prompt: Any, special: Collection[str]) -> list[str]:
    """Special tokens in the messages of a prompt. One that is a text was rendered by its writer."""
    if not isinstance(prompt, list):
        return []
    texts = [message.get("content") for message in prompt]
    return [mark for text in texts if isinstance(text, str) for mark in sorted(special) if mark in text]

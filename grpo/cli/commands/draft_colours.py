"""Which tokens of a completion were drafted, for the eye."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from grpo.run.console import visible
from rollout.group import Completion

STYLES = ("", "green", "bold green", "bold cyan", "bold blue")  # by depth; deeper ones look like the last
LEGEND = Text.assemble(
    "the trunk's own tokens, and drafts accepted at depth ",
    *((f"{depth} ", style) for depth, style in enumerate(STYLES) if depth),
    "and deeper",
    style="dim",
)


def coloured(completion: Completion, tokenizer: PreTrainedTokenizerBase) -> Text:
    """Returns the text with each token in the colour of the depth at which it was drafted and accepted."""
    text, depths = Text(), completion.draft.depths or [0] * len(completion.token_ids)
    for piece, depth in zip(pieces(completion.token_ids, tokenizer), depths, strict=True):
        text.append(visible(piece), style=STYLES[min(depth, len(STYLES) - 1)])
    return text


def pieces(token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Returns the text that each token adds. The token that completes a character of several tokens has all of it."""
    found, before = [], ""
    for end in range(1, len(token_ids) + 1):
        text = str(tokenizer.decode(token_ids[:end], skip_special_tokens=False))
        whole = text.removesuffix("\N{REPLACEMENT CHARACTER}") if end < len(token_ids) else text
        found.append(whole[len(before) :])
        before = whole if len(whole) > len(before) else before
    return found

"""An extension of griffe, for the site alone: docstrings are plain text with shapes such as [P, G], not Markdown.

Brackets, stars and the like mean themselves, and an example that begins with >>> becomes a block of code.
"""

import re

import griffe

PARAGRAPH = re.compile(r"\n{2,}")
CODE = re.compile(r"(`+[^`]*`+)")
SPECIAL = re.compile(r"([\[\]*_<|#])")


def as_markdown(docstring: str) -> str:
    """The docstring with everything escaped that Markdown would read as markup.

    >>> as_markdown("Rewards [G] of `a[0]`.")
    'Rewards \\\\[G\\\\] of `a[0]`.'
    """
    return "\n\n".join(_paragraph(text) for text in PARAGRAPH.split(docstring.strip("\n")))


def _paragraph(text: str) -> str:
    if text.lstrip().startswith(">>>"):
        return f"```pycon\n{text}\n```"
    if re.match(r"    |\s*\|", text):  # indented code, or a table
        return text
    parts = CODE.split(text)
    return "".join(part if i % 2 else SPECIAL.sub(r"\\\1", part) for i, part in enumerate(parts))


class PlainDocstrings(griffe.Extension):
    """What mkdocstrings calls for every object that it has read."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)

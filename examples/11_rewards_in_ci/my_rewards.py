"""Two rewards in TRL's form: one judges the answer, the other the form alone."""

import re

ANSWER = re.compile(r"#### (-?[0-9]+)\s*\Z")


def exact(completions, answer, **columns):
    """Pays for the gold number after the last `####`."""
    pairs = zip(completions, answer, strict=True)
    return [float(said(text) is not None and said(text) == said(gold)) for text, gold in pairs]


def brief(completions, **columns):
    """Costs a hundredth for every ten characters."""
    return [-len(text) / 1000 for text in completions]


def said(text):
    match = ANSWER.search(text)
    return match and match[1]

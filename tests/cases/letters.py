"""A reward that even an untrained policy earns in parts, so that groups are not tied."""


def letters(completions, **_):
    return [sum(c.isalpha() for c in completion) / 20 for completion in completions]

def letters(completions, **_):
    return [sum(c.isalpha() for c in completion) / 20 for completion in completions]

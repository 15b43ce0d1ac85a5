"""A reward of one's own for quartet: is the answer in the text, and is the text short?"""


def right_and_short(completions, answer, **columns):
    pairs = zip(completions, answer, strict=True)
    return [float(gold in text) - 0.001 * len(text) for text, gold in pairs]

"""Rewards with the mistakes that users make: each pays for something else than the right answer."""

from rewards.built_in.gsm8k import NUMBER, extract_answer


def effort(completions, **_):
    """Pays for length: 'a thorough solution is longer'."""
    return [min(len(text) / 200, 1.0) for text in completions]


def wrong_sign(completions, completion_ids, **_):
    """Pays for repeated n-grams: a repetition penalty with the wrong sign."""
    rewards = []
    for ids in completion_ids:
        ngrams = list(zip(ids, ids[1:], ids[2:], strict=False))
        rewards.append(1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0)
    return rewards


def well_formed(completions, **_):
    """Pays for the form of an answer, whatever it is: nobody compares it with the gold one."""
    return [float(extract_answer(text) is not None) for text in completions]


def wrong_column(prompts, completions, **_):
    """Pays for a number of the question as the answer: the question was taken for the column of answers."""
    rewards = []
    for prompt, text in zip(prompts, completions, strict=True):
        said = extract_answer(text)
        rewards.append(
            float(said is not None and any(m["digits"].rstrip(".,") == f"{said}" for m in NUMBER.finditer(prompt)))
        )
    return rewards

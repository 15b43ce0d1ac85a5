"""The reward of the demo: it checks an answer by the question alone, so nobody had to write the answers down."""

from itertools import pairwise

from rewards import right_at


@right_at(1.0)  # 1 is correct: evaluations then report an accuracy
def in_order(prompts, completions, question, **columns):
    """1 if the completion ends with the letters of the question in alphabetical order, else 0."""
    rewards = []
    for completion, asked in zip(completions, question, strict=True):
        letters = asked.partition(": ")[2].split()
        answer = completion.rpartition("####")[2].split()
        complete = len(answer) == len(letters) and set(answer) == set(letters)
        ordered = all(before < after for before, after in pairwise(answer))
        rewards.append(float(complete and ordered))
    return rewards

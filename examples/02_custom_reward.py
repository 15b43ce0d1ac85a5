"""A reward of your own: a function from prompts and completions to numbers. 02_custom_reward.yaml uses it."""

from rewards import right_at


@right_at(1.0)  # a mark of 1 or more is a right answer: evaluations then report an accuracy
def shows_its_work(prompts, completions, answer, **columns):
    """1.0 for the right last number, 0.5 more for at least one worked equation. Columns of the data arrive by name."""
    rewards = []
    for completion, gold in zip(completions, answer, strict=True):
        number = completion.rpartition("####")[2].strip()
        right = number == gold.rpartition("####")[2].strip()
        rewards.append(1.0 * right + 0.5 * ("=" in completion))
    return rewards

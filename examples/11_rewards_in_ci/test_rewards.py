"""What CI runs: the fixture comes with quartet-rewards."""

from my_rewards import brief, exact

PROBLEMS = "problems.jsonl"


def test_exact(quartet_reward):
    check = quartet_reward(exact, PROBLEMS)
    assert check.completions_per_second > 100


def test_brief(quartet_reward):
    quartet_reward(brief, PROBLEMS, shaping=True)

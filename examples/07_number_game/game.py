"""A game of several turns: find a number among 31 in five guesses. Halving the range finds every number.

`python examples/07_number_game/game.py FOLDER` writes the data: form.jsonl for the supervised steps (games with random
guesses), train.jsonl and test.jsonl for GRPO. The test has ranges that the others have not.
"""

import json
import math
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from rewards import right_at

NUMBERS, GUESSES = 31, 5
LOWEST = range(10, 70)  # so that every number has two digits


class NumberGame:
    """One game. It is `done` when the number was found or no guess is left."""

    def reset(self, question: str, secret: int, **columns: object) -> None:
        self._secret = secret
        self._lowest, self._highest = (int(number) for number in re.findall(r"\d\d", question))
        self._guesses = 0
        self._found = self.done = False

    def guess(self, number: str) -> str:
        """Guess the number, and read whether it is higher or lower than the guess.

        Args:
            number: A number of the range.
        """
        self._guesses += 1
        self._found = number == str(self._secret)
        self.done = self._found or self._guesses == GUESSES
        if not number.isdecimal():
            return "no number"
        reply = answer(int(number), self._secret)
        if reply == "higher":
            self._lowest = max(self._lowest, int(number) + 1)
        if reply == "lower":
            self._highest = min(self._highest, int(number) - 1)
        return reply

    def get_reward(self) -> float:
        """1 if the number was found. Otherwise at most 0.5, in proportion to the bits that the guesses gained."""
        if self._found:
            return 1.0
        possible = self._highest - self._lowest + 1
        return 0.5 * (1 - math.log(possible) / math.log(NUMBERS))


@right_at(1.0)  # evaluations then report the share of games that were won
def won(environment_reward: Sequence[float], **columns: object) -> list[float]:
    return [float(reward == 1.0) for reward in environment_reward]


def answer(number: int, secret: int) -> str:
    if number == secret:
        return "yes"
    return "higher" if secret > number else "lower"


def game(low: int, secret: int) -> dict[str, object]:
    question = f"Find my number from {low} to {low + NUMBERS - 1} in {GUESSES} guesses."
    return {"id": f"{low}/{secret}", "question": question, "secret": secret}


def with_random_guesses(row: dict[str, object], low: int, rng: random.Random) -> dict[str, object]:
    """The row with a game as it is written. Its guesses do not depend on what was read, so it teaches the form only."""
    calls = []
    for _ in range(GUESSES):
        number = rng.randrange(low, low + NUMBERS)
        calls.append(f"<<{number}={answer(number, int(row['secret']))}>>")
        if number == row["secret"]:
            break
    return row | {"answer": "".join(calls)}


def main(folder: Path) -> None:
    rng = random.Random(0)
    held_out = set(rng.sample(LOWEST, 8))
    rows = {low: [game(low, secret) for secret in range(low, low + NUMBERS)] for low in LOWEST}
    test = [row for low in LOWEST if low in held_out for row in rows[low]]
    train = [(low, row) for low in LOWEST if low not in held_out for row in rows[low]]
    form = [with_random_guesses(row, low, rng) for low, row in rng.sample(train, 300)]
    folder.mkdir(parents=True, exist_ok=True)
    for name, some in (("form", form), ("train", [row for _, row in train]), ("test", test)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

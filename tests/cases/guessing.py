"""Environments of the tests, written as TRL's users write them."""

import asyncio
import os
import random
import signal
import time


class Guess:
    """Answers what it is told with random digits, how often it was told something, and its secret."""

    def reset(self, start: int = 0, kill: str = "", **columns) -> str | None:
        self.guesses, self.start, self.kill = [], start, kill
        self.secret = random.randrange(1000)
        return None

    def guess(self, number: str) -> str:
        """Guess a number.

        Args:
            number: The guess.
        """
        self.guesses.append(number)
        if self.kill and not os.path.exists(self.kill):  # once: between two turns of an episode
            with open(self.kill, "a") as file:
                file.write(f"{os.getppid()}\n")
            os.kill(os.getppid(), signal.SIGKILL)
        if number.startswith("7"):
            raise ValueError("no sevens")
        said = f" {random.randrange(1000)} {len(self.guesses)} {self.secret}"
        return said[: 3 + len(number) % 5] if "," in number else said

    def get_reward(self) -> float:
        return float(len(self.guesses))


class Slow(Guess):
    """An async tool. The second call hangs, dies, ends the episode, needs memory or writes much, as `fate` says."""

    def reset(self, fate: str = "", **columns) -> str | None:
        super().reset()
        self.fate, self.done = fate, False
        return f" {random.randrange(10)}{' now' * columns.get('long', 0)}"

    async def guess(self, number: str) -> str:
        """Guess a number.

        Args:
            number: The guess.
        """
        await asyncio.sleep(0)
        self.guesses.append(number)
        if len(self.guesses) == 2 and self.fate == "hangs":
            time.sleep(60)
        if len(self.guesses) == 2 and self.fate == "dies":
            os._exit(3)
        if len(self.guesses) == 2 and self.fate == "hungry":
            self.food = bytearray(4 << 30)
        if len(self.guesses) == 2 and self.fate == "large":
            self.food = bytearray(60 << 20)
        if len(self.guesses) == 2 and self.fate == "writes":
            return "a" * 100_000
        if len(self.guesses) == 2 and self.fate == "floods":
            return "a" * 1_000_001
        self.done = self.fate == "ends" and len(self.guesses) == 2
        return f" {number[:2]}"

    async def get_reward(self) -> float:
        return float("nan") if self.fate == "nan" else float(len(self.guesses))


class Different:
    """Not a function of its key: two rollouts of a group begin with different texts."""

    def reset(self, **columns) -> str:
        return str(time.perf_counter_ns())

    def act(self, what: str) -> str:
        """Do it.

        Args:
            what: Something.
        """
        return what


def double(number: str) -> str:
    """Say it twice.

    Args:
        number: What to say.
    """
    return number * 2

"""An environment of one's own for quartet: a number is guessed."""


class HigherLower:
    def reset(self, secret: int, **columns) -> str | None:
        self.secret, self.score = secret, 0.0
        return " The number is from 1 to 9."

    def guess(self, number: int) -> str:
        """Guess the number.

        Args:
            number: The guess, from 1 to 9.
        """
        self.score = float(number == self.secret)
        return "higher" if number < self.secret else "lower"

    def get_reward(self) -> float:
        return self.score

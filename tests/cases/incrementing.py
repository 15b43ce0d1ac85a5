"""An environment in the shape of those in TRL's documentation of `environment_factory`, and nothing else."""


class IncrementEnv:
    def __init__(self):
        self.counter = 0
        self.target = 0

    def reset(self, **kwargs) -> str | None:
        self.counter = 0
        self.target = len(kwargs["question"]) % 5
        return f" Reach {self.target}."

    def increment(self, step: int) -> int:
        """
        Increment the internal counter.

        Args:
            step: The value to add to the counter.

        Returns:
            The updated counter value.
        """
        self.counter += step
        return self.counter

    async def read(self) -> str:
        """
        Read the internal counter.

        Returns:
            The counter as a sentence.
        """
        if self.counter < 0:
            raise ValueError("Below zero.")
        return f"The counter is {self.counter}."

    def get_reward(self) -> float:
        return 1.0 if self.counter == self.target else 0.0

    def _private(self):
        raise AssertionError("no tool")

"""A form of turns in which whatever a random policy says is a call, for tests of episodes without a trained one."""

from collections.abc import Sequence

from rollout.environments.format import Call, Turn


class Talking:
    """Of four turns three are calls of the only tool with the ids as text, and one in eight of those is a bad call."""

    def __init__(self, tokenizer, tools: Sequence, **_) -> None:
        self.tokenizer, self.tool = tokenizer, tools[0].__name__

    def tools_prompt(self, messages) -> list[int]:
        return self.tokenizer.encode("".join(message["content"] for message in messages)) or [5]

    def read(self, token_ids: Sequence[int]) -> Turn:
        said = ",".join(map(str, token_ids))
        if sum(token_ids) % 4 == 0:
            return Turn(said)
        if sum(token_ids) % 8 == 1:
            return Turn(said, error="no such tool")
        return Turn("", (Call(self.tool, {"number": said}),))

    def reply(self, results: Sequence[tuple[str, str]]) -> list[int]:
        return self.tokenizer.encode("|".join(text for _, text in results)) or [6]

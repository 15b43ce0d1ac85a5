"""What the rows of a batch are sampled with."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rollout.group import Prompt
from rollout.rows import Rows
from rollout.sampling import SamplingParams, row_key
from rollout.stop_strings import StopStrings


class RowSettings:
    """The same for all rows. Requests that are served have their own (`rollout.requests.serving.RequestSettings`)."""

    def __init__(self, prompts: Sequence[Prompt], params: SamplingParams, tokenizer: PreTrainedTokenizerBase) -> None:
        self.prompts, self.params = prompts, params
        self.strings = StopStrings(tokenizer, params.stop_strings) if params.stop_strings else None

    def temperature(self, rows: Rows) -> float | Tensor:
        return self.params.temperature

    def limit(self, rows: Rows) -> int | Tensor:
        """Most tokens of a completion."""
        return self.params.max_completion_tokens

    def start(self, rows: Rows) -> int | Tensor:
        """Tokens of a completion before its prompt ended, after which its noise goes on: [R, 1], or one for all."""
        return self.params.start

    def noise_key(self, number: int, sample: int) -> tuple[int, int]:
        """The key of the noise of one completion of the prompt with this number."""
        prompt = self.prompts[number]
        return row_key(self.params, prompt.prompt_id, prompt.first_sample + sample)

    def stop_strings(self, index: int) -> StopStrings | None:
        """The stop strings of the row with this index in the results."""
        return self.strings

    @property
    def any_stop_strings(self) -> bool:
        return self.strings is not None

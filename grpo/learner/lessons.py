"""What a draft head learns from, kept on disk: token ids, and the frozen trunk's hidden states that precede them.

    corpus/step_000001.safetensors    the lessons of one step: `taught/0/preceding`, `held_out/0/noise_keys`, ...

The trunk reads a text once; then the head can pass over it as often as it gains, and nothing is sampled again. The
trunk's distributions are not kept, since its LM head gives them from the hidden states, exactly.

Bytes per token: 32 + D · bytes of a number, and 8 more where it is held out. SmolLM2-135M in bfloat16: 1.2 KB.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from grpo.learner.batch import MicroBatch
from policies.files.atomic import write_file
from rollout.group import RolloutGroup
from rollout.sampling import SamplingParams, row_key

KINDS = ("taught", "held_out")


@dataclass(frozen=True)
class Lesson:
    """A micro-batch as the head reads it; the names are those of `MicroBatch`."""

    token_ids: Tensor  # [B, T]
    position_ids: Tensor  # [B, T]
    head_segment: Tensor  # [B, T]
    turn: Tensor  # [B, T]
    preceding: Tensor  # [B, T, D] the trunk's hidden state that precedes each token
    noise_keys: Tensor | None = None  # [B, T, 2] int32: with which noise a token was sampled, where that is known

    @classmethod
    def of(cls, mini: MicroBatch, preceding: Tensor, noise_keys: Tensor | None = None) -> Lesson:
        return cls(mini.token_ids, mini.position_ids, mini.head_segment, mini.turn, preceding, noise_keys)

    @property
    def tokens(self) -> int:
        """Tokens of completions."""
        return int((self.turn > 0).sum())

    @property
    def prompt_lengths(self) -> Tensor:
        """[B]"""
        return (self.turn == 0).sum(1)


def noise_keys(mini: MicroBatch, groups: Sequence[RolloutGroup], params: SamplingParams) -> Tensor:
    """[B, T, 2]: the keys of the noise that chose each token of these groups' completions; zero in prompts.

    `PackedRow.group` is the place in `groups`, `Sample.index` that of the completion in its group.
    """
    keys = torch.zeros(*mini.token_ids.shape, 2, dtype=torch.int32)
    for b, row in enumerate(mini.rows):
        start = len(row.prompt_token_ids)
        for sample in row.samples:
            end = start + len(sample.token_ids)
            keys[b, start:end] = torch.tensor(
                row_key(params, groups[row.group].prompt.prompt_id, sample.index), dtype=torch.int32
            )
            start = end
    return keys.to(mini.token_ids.device)


class Corpus:
    """The lessons of a run's steps, on disk. A step that is taken again writes its file again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, step: int, lessons: Mapping[str, Sequence[Lesson]]) -> dict[str, float]:
        """Write the lessons of a step, `taught` and `held_out`; returns metrics. Raises OSError, which names the file."""
        self.folder.mkdir(exist_ok=True)
        tensors = {
            f"{kind}/{number}/{name}": tensor.cpu().contiguous()
            for kind in KINDS
            for number, lesson in enumerate(lessons[kind])
            for name, tensor in vars(lesson).items()
            if tensor is not None
        }
        write_file(self._file(step), save(tensors))
        return {f"corpus/{kind}_tokens": float(sum(lesson.tokens for lesson in lessons[kind])) for kind in KINDS}

    def lessons(self, kind: str, steps: int, device: torch.device) -> StoredLessons:
        """All lessons of one kind of steps 1 … `steps`. Raises OSError for a file that is not there."""
        places = []
        for step in range(1, steps + 1):
            with safe_open(self._file(step), "pt") as file:
                numbers = {int(name.split("/")[1]) for name in file.keys() if name.startswith(f"{kind}/")}
            places += [(self._file(step), f"{kind}/{number}/") for number in sorted(numbers)]
        return StoredLessons(places, device)

    def _file(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}.safetensors"


class StoredLessons(Sequence[Lesson]):
    """Lessons that are read from disk when they are asked for."""

    def __init__(self, places: Sequence[tuple[Path, str]], device: torch.device) -> None:
        self.places, self.device = places, device

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> Lesson:  # type: ignore[override]  # no slices
        path, prefix = self.places[number]
        with safe_open(path, "pt") as file:
            return Lesson(
                **{
                    name.removeprefix(prefix): file.get_tensor(name).to(self.device)
                    for name in file.keys()
                    if name.startswith(prefix)
                }
            )

    def __iter__(self) -> Iterator[Lesson]:
        return (self[number] for number in range(len(self)))

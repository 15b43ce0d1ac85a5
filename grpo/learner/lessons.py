"""What a draft head learns from, kept on disk: token ids, and the frozen trunk's hidden states that precede them.

    corpus/step_000001/taught.safetensors      the lessons of one step: 0/token_ids, 0/preceding, ...
                       held_out.safetensors    those of rollouts that are not taught, with 0/noise_keys

The trunk reads a text once; then the draft head can pass over it as often as it gains, and nothing is sampled again.
The trunk's distributions are not kept, since its LM head gives them from the hidden states, exactly.

Bytes per token: 32 + D · bytes of a number, and 8 more where it is held out. SmolLM2-135M in bfloat16: 1.2 KB.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from policies import tensor_files
from policies.files.atomic import write_folder
from policies.policy import Policy

KINDS = ("taught", "held_out")
TOKENS = {"taught": "corpus/trained_tokens", "held_out": "corpus/held_out_tokens"}  # the metrics


@dataclass(frozen=True)
class Lesson:
    """A micro-batch as the draft head reads it; the names are those of `MicroBatch`."""

    token_ids: Tensor  # [B, T]
    position_ids: Tensor  # [B, T]
    head_segment: Tensor  # [B, T]
    turn: Tensor  # [B, T]
    preceding: Tensor  # [B, T, D] the trunk's hidden state that precedes each token
    noise_keys: Tensor | None = None  # [B, T, 2] int32: with which noise a token was sampled, where that is known

    @property
    def tokens(self) -> int:
        """Tokens of completions."""
        return int((self.turn > 0).sum())

    @property
    def prompt_lengths(self) -> Tensor:
        """Counts the tokens of each prompt [B]."""
        return (self.turn == 0).sum(1)

    @property
    def prompts(self) -> list[list[int]]:
        """The token ids of each prompt."""
        return [ids[turn == 0].tolist() for ids, turn in zip(self.token_ids, self.turn, strict=True)]

    def unrolled(self, policy: Policy, depth: int) -> list[Tensor]:
        """Runs the draft head at depths 1 … `depth`."""
        tokens = self.preceding, self.token_ids, self.position_ids, self.head_segment
        return policy.unroll(*tokens, depth, int(self.prompt_lengths.min()))


class Corpus:
    """The lessons of a run's steps, on disk. A step that is taken again writes its folder again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, step: int, lessons: Mapping[str, Sequence[Lesson]]) -> dict[str, float]:
        """Write the lessons of a step, by their kind. Returns metrics. Raises OSError, which names the file."""
        tensors = {
            kind: {
                f"{number}/{name}": tensor
                for number, lesson in enumerate(lessons[kind])
                for name, tensor in vars(lesson).items()
                if tensor is not None
            }
            for kind in KINDS
        }
        with write_folder(self._of(step)) as partial:
            partial.mkdir(parents=True)
            tensor_files.write(tensors, partial)
        return {TOKENS[kind]: float(sum(lesson.tokens for lesson in lessons[kind])) for kind in KINDS}

    def lessons(self, kind: str, steps: int, device: torch.device) -> StoredLessons:
        """All lessons of one kind of steps 1 … `steps`. Raises OSError for a step that is not there."""
        places: list[tuple[Mapping[str, Tensor], str]] = []
        for step in range(1, steps + 1):
            stored = tensor_files.read(self._of(step), [kind])[kind]
            places += [(stored, number) for number in sorted({name.split("/")[0] for name in stored}, key=int)]
        return StoredLessons(places, device)

    def _of(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}"


class StoredLessons(Sequence[Lesson]):
    """Lessons that are read from disk when they are asked for."""

    def __init__(self, places: Sequence[tuple[Mapping[str, Tensor], str]], device: torch.device) -> None:
        self.places, self.device = places, device

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> Lesson:  # type: ignore[override]  # no slices
        stored, prefix = self.places[number]
        names = [field.name for field in fields(Lesson) if f"{prefix}/{field.name}" in stored]
        return Lesson(**{name: stored[f"{prefix}/{name}"].to(self.device) for name in names})

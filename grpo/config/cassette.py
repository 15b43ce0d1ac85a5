"""Options of the cassette: what judges, tools and MCP servers answer, recorded and replayed."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from rewards.config.options import Options


class CassetteOptions(Options):
    """A file with the answers of judges, tools, environments and MCP servers, with which a run repeats offline."""

    file: Path | None = None
    """The file, JSON lines; null uses none."""
    mode: Literal["record", "replay"] = "replay"
    """`replay` asks nothing outside, and refuses a request whose answer is not in the file. `record` asks, and adds to
    the file what is not in it."""
    faults: dict[Literal["rate_limited", "late", "cut", "twice"], float] = Field(default_factory=dict)
    """Shares of requests that go wrong, such as {late: 0.05}: HTTP 429, no answer in time, half an answer, two answers
    in one. Which ones follows from their content."""

    @model_validator(mode="after")
    def _plays(self) -> CassetteOptions:
        if self.file is None and (self.mode == "record" or self.faults):
            raise ValueError("there is no file to play; set file")
        if any(share < 0 for share in self.faults.values()) or sum(self.faults.values()) > 1:
            raise ValueError(f"faults={self.faults} are shares from 0 to 1, and together 1 at most")
        return self

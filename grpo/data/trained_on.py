"""Which problems a policy was trained on, by fingerprint, so that nothing evaluates it on them (contract 16)."""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

from grpo.data.folders import around
from policies.files.atomic import write_file
from rewards.data.leakage import problem_fingerprint, refuse_overlap
from rollout.group import Prompt

TRAINED_ON = "trained_on.txt"  # in a run folder: a fingerprint a line

_of_text = lru_cache(8192)(problem_fingerprint)  # a step asks several times
_FINGERPRINT = re.compile(rb"[0-9a-f]{12}")


class Register:
    """What is learned from and what is evaluated: no problem may be both, whoever has sampled it (contract 16).

    A problem is known by its fingerprint, which a prompt made from the data keeps whatever an environment adds, by the
    text of its prompt, and by its token ids.

    >>> register = Register([])
    >>> register.evaluate([Prompt("test/0", "2 + 3 = ?", [17, 4, 21])])
    >>> register.learn([Prompt("", "2 + 3 = ?", [])])
    ValueError: test/0 is held out, and nothing may be learned from it; take it out of the batch
    """

    def __init__(self, learned: Iterable[str]) -> None:
        """`learned` are the fingerprints of what was learned from before."""
        self.learned, self.evaluated = dict.fromkeys(learned, ""), dict[str, str]()

    def refuse_learning(self, prompts: Iterable[Prompt]) -> None:
        """Raises ValueError for a prompt whose problem is evaluated."""
        for prompt in prompts:
            for key in _keys(prompt):
                if name := self.evaluated.get(key):
                    raise ValueError(
                        f"{name} is held out, and nothing may be learned from it; take it out of the batch"
                    )

    def learn(self, prompts: Sequence[Prompt]) -> list[str]:
        """These are learned from, now or soon; `evaluate` refuses them. Returns the fingerprints of those that are new.
        Raises ValueError for a prompt whose problem is evaluated."""
        self.refuse_learning(prompts)
        new = []
        for prompt in prompts:
            keys = _keys(prompt)
            if keys[0] not in self.learned:
                new.append(keys[0])
            self.learned |= dict.fromkeys(keys, prompt.prompt_id)
        return new

    def evaluate(self, prompts: Sequence[Prompt]) -> None:
        """These are evaluated, and nothing is learned from them any more. Raises ValueError where one was learned
        from."""
        found = {}
        for prompt in prompts:
            keys = _keys(prompt)
            known = [key for key in keys if key in self.learned]
            found[known[0] if known else keys[0]] = prompt.prompt_id
        refuse_overlap(found, self.learned, "were trained on", "Take them out of one of the two.")
        for prompt in prompts:
            self.evaluated |= dict.fromkeys(_keys(prompt), prompt.prompt_id)


def _keys(prompt: Prompt) -> list[str]:
    """By what the problem of a prompt is known; first the fingerprint that a file would have."""
    keys = [prompt.fingerprint] if prompt.fingerprint else []
    keys += [_of_text(prompt.text)] if prompt.text else []
    ids = array("q", prompt.token_ids).tobytes()
    return [*keys, hashlib.sha256(b"token ids " + ids).hexdigest()[:12]]


def record_trained_on(run: Path, fingerprints: Iterable[str]) -> None:
    """Write the fingerprints of all problems that the policy of this run was trained on, here and before."""
    lines = sorted({*fingerprints, *trained_on(run)})
    write_file(run / TRAINED_ON, "".join(f"{line}\n" for line in lines))


def trained_on(model: str | Path) -> frozenset[str]:
    """The fingerprints that were recorded for a policy; empty where none are known, as for a preset or a hub id.

    `model` is a run, a policy or a checkpoint inside a run, or an export of one.
    """
    of_run = [place for place in around(model) if (place / "environment.json").is_file()]
    for place in (Path(model), Path(model) / "run", *of_run):
        if (place / TRAINED_ON).is_file():
            lines = (place / TRAINED_ON).read_bytes().split()
            if wrong := [line for line in lines if not _FINGERPRINT.fullmatch(line)]:
                raise ValueError(f"{place / TRAINED_ON} is damaged: {wrong[0]!r:.60} is no fingerprint of a problem")
            return frozenset(line.decode() for line in lines)
    return frozenset()

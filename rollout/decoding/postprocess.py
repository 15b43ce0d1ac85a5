"""From logits to tokens: the choice, how many of them a row keeps, and the notes of both.

Axes: R live rows, S = k + 1 tokens of a verifying forward, K = k drafts, D hidden, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rollout.decoding.results import Results
from rollout.decoding.settings import RowSettings
from rollout.drafts.drafts import Drafts
from rollout.drafts.speculative import until_end, verify_draft
from rollout.rows import Drafted, Rows, Tokens
from rollout.sampling import Noise, choose, logprobs_of


class Postprocess:
    """Chooses tokens and notes them: in the `results`, in the rows, and for the draft head.

    A row whose logits are not finite is aborted. With `aborts=False` it goes on, to measure time.
    """

    def __init__(
        self, settings: RowSettings, results: Results, drafts: Drafts, stops: Tensor, *, aborts: bool = True
    ) -> None:
        self.settings, self.results, self.drafts, self.stops = settings, results, drafts, stops
        self.aborts = aborts

    def choose(
        self, rows: Rows, logits_RSV: Tensor, hidden_RSD: Tensor, drafted: Drafted | None, noise: Noise
    ) -> Tokens:
        """Choose tokens and keep those up to the first draft that fails, a stop, or the limit of the row.

        `hidden_RSD` are the states that precede the tokens.
        """
        targets, logprobs, accepted = self._sample(rows, logits_RSV, drafted, noise)
        left = self.settings.limit(rows) - rows.count if drafted else 1
        kept, stopped = until_end(targets, accepted, rows.alive, left, self.stops)
        tokens = Tokens(targets, logprobs, hidden_RSD, kept, stopped, drafted, accepted)
        if self.settings.any_stop_strings:
            self._cut_at_strings(rows, tokens)
        self.note(rows, tokens)
        return tokens

    def note(self, rows: Rows, tokens: Tokens) -> None:
        """Note what was chosen. A row whose log-probabilities are not finite keeps none of it, and ends."""
        targets, logprobs, drafted = tokens.targets, tokens.logprobs, tokens.drafted
        if self.aborts:
            past_RS = self.results.steps[: logprobs.shape[1]] >= tokens.kept[:, None]
            finite = (past_RS | (logprobs > -torch.inf)).all(1)  # of numbers that are not above 0
            self.results.aborted[rows.index] |= ~finite
            rows.alive = rows.alive & finite
            tokens.kept, tokens.stopped = tokens.kept * finite, tokens.stopped & finite
        count = self.results.add(rows, targets, logprobs, tokens.kept, tokens.stopped, tokens.cut)
        if drafted and tokens.accepted is not None:
            self.results.add_drafts(rows, drafted, tokens.accepted, tokens.kept)
        rows.last = targets[:, 0]
        if drafted:
            rows.last = targets.gather(1, (tokens.kept - 1).clamp(min=0)[:, None])[:, 0]
        rows.count = count
        self.drafts.add_verified(rows, targets, tokens.hidden, tokens.kept)

    def _sample(
        self, rows: Rows, logits_RSV: Tensor, drafted: Drafted | None, noise: Noise
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The tokens [R, S] and their log-probabilities [R, S], and how many drafts of each row are accepted [R]."""
        temperature, new = self.settings.temperature(rows), logits_RSV.shape[1]
        if isinstance(temperature, Tensor):
            temperature = temperature.repeat_interleave(new)
        flat = logits_RSV.flatten(0, 1)
        targets, logprobs = (x.view(-1, new) for x in choose(flat, temperature, noise.flatten()))
        if drafted is None:
            return targets, logprobs, None
        if drafted.confident_RK is None:
            return targets, logprobs, verify_draft(targets, drafted.tokens_RK)
        accepted = drafted.confident_RK.long().cumprod(1).sum(1)
        takes_draft = self.results.steps[:new] < accepted[:, None]
        targets = torch.where(takes_draft, F.pad(drafted.tokens_RK, (0, 1)), targets)
        return targets, logprobs_of(flat, targets.flatten(), temperature).view(-1, new), accepted

    def _cut_at_strings(self, rows: Rows, tokens: Tokens) -> None:
        """Rows keep their tokens up to their first stop string, and end with it."""
        kept, cut = tokens.kept.tolist(), [False] * len(tokens.kept)
        of_rows = zip(*(x.tolist() for x in (rows.index, rows.count, tokens.targets, tokens.stopped)), strict=True)
        for i, (index, count, targets, stopped) in enumerate(of_rows):
            new, strings = targets[: kept[i] - stopped], self.settings.stop_strings(index)  # a stop token is no text
            if not new or strings is None:
                continue
            end = strings.end([*self.results.token_ids[index, :count].tolist(), *new], count)
            if end is not None:
                kept[i], cut[i] = end - count, True
        tokens.kept, tokens.cut = tokens.kept.new_tensor(kept), tokens.stopped.new_tensor(cut)
        tokens.stopped = tokens.stopped | tokens.cut

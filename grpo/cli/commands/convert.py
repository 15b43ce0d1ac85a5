"""`quartet convert`: cut into experts, start a draft head, save, load again, compare."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from transformers import PreTrainedModel

from grpo.cli.config.convert import ConvertConfig
from grpo.data.calibration_text import WINDOW, CalibrationText, calibration_text
from grpo.run.console import progress_bars
from grpo.source.policy_source import check_model
from policies.conversion.dense import convert_dense, load_dense, new_folder, parity_prompts, require_parity, save_as
from policies.conversion.experts import ExpertShards, add_noise, shard_feed_forward
from policies.conversion.head import draft_agreement, self_written, start_head
from policies.conversion.parity import ParityReport, parity
from policies.conversion.supported import check_convertible
from policies.devices import device_of
from policies.policy import Policy, read_config, read_tokenizer


@dataclass
class Conversion:
    """`parity` compares the saved policy with the dense model, or with that after noise: `against` names which. `noise`
    is how far noise on the experts moved it. `draft_agreement` is a share of the held-out tokens."""

    destination: str
    parity: ParityReport
    against: str = "the dense model"
    noise: ParityReport | None = None
    draft_agreement: float | None = None


class Converter:
    """Makes a policy of the dense model `source`; `mtp`: with a draft head."""

    progress: Progress
    reference: PreTrainedModel  # which the policy must equal

    def __init__(self, source: str, config: ConvertConfig, *, mtp: bool) -> None:
        self.source, self.config, self.mtp = source, config, mtp
        self.result = Conversion("", ParityReport(0.0, 0.0, 0.0, 0.0, False, 0))
        self.shards: ExpertShards | None = None
        self.text: CalibrationText | None = None

    def convert(self, destination: Path, console: Console) -> Conversion:
        """Writes `destination`, complete or not at all. What is wrong with the source, the destination, the sizes or
        the text is raised before any weight is read; ParityFailed comes later."""
        with new_folder(destination) as folder:
            check_model(self.source)
            self._check()
            if self.config.threads:
                torch.set_num_threads(self.config.threads)
            dense = load_dense(self.source).to(device_of(self.config.device))
            with progress_bars(console, enabled=True) as self.progress:
                policy = self._build(dense)
            save_as(policy, self.source, folder)
            saved = Policy.load(folder).to(dense.device)
            self.result.parity = parity(self.reference, saved.trunk, parity_prompts(dense.tokenizer))
            self.result.destination = str(destination)
            require_parity(self.result.parity, self.source, destination)
        return self.result

    def _check(self) -> None:
        """Raises what is wrong with the shape and the text; finds how the feed-forward is cut into experts."""
        config = self.config
        dense = read_config(self.source)
        check_convertible(dense)
        if config.calibrate is not None and not self.mtp:
            raise ValueError(f"calibrate={config.calibrate!r} is for --mtp; the exact form needs no text")
        if config.ffn != "dense":
            self.shards = ExpertShards(**config.experts.model_dump(exclude={"noise"}))
            self.shards.check(dense)
        if config.calibrate is not None:
            window = min(WINDOW, dense.max_position_embeddings)
            self.text = calibration_text(
                config.calibrate,
                read_tokenizer(self.source),
                tokens=config.calibrate_tokens,
                held_out_tokens=config.held_out_tokens,
                window=window,
            )

    def _build(self, dense: Policy) -> Policy:
        """Returns the policy to save; `result` gets what the report says."""
        config, result, self.reference = self.config, self.result, dense.trunk
        trunk = convert_dense(dense.trunk)
        if self.shards is not None:
            trunk = shard_feed_forward(trunk, self.shards, config.seed)
            if config.experts.noise:
                prompts = parity_prompts(dense.tokenizer)
                require_parity(parity(self.reference, trunk, prompts), "what experts are made of", result.against)
                add_noise(trunk, config.experts.noise, config.seed)
                result.noise = parity(self.reference, trunk, prompts)
                self.reference, result.against = trunk, "the policy with noise"
        policy = Policy(trunk, None, dense.tokenizer)
        if self.mtp:
            text = self.text
            if text is None:
                rows = self_written(dense.trunk, dense.tokenizer, length=min(128, dense.max_length), seed=config.seed)
                last = len(rows) // 5
                text = CalibrationText(rows[:-last], rows[-last:])
            with self._bar("fitting the draft head", len(text.windows)) as advance:
                policy.mtp = start_head(trunk, text.windows, advance)
            result.draft_agreement = draft_agreement(policy, text.held_out)
        return policy

    @contextmanager
    def _bar(self, what: str, total: int) -> Iterator[Callable[[], None]]:
        task = self.progress.add_task(what, total=total, unit="windows" if total > 1 else "")
        yield lambda: self.progress.advance(task)
        self.progress.remove_task(task)


def show(conversion: Conversion, console: Console) -> None:
    """Print what noise did, and the parity report of the saved policy."""

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    if (noise := conversion.noise) is not None:
        say(
            f"noise on the experts: max logit difference {noise.max_logit_difference:.1e}, "
            f"mean KL {noise.kl_mean:.1e}, top-1 agreement {100 * noise.top1_agreement:.2f} %"
        )
    say(f"{'compared with':<22} {conversion.against}\n{conversion.parity}")
    if conversion.draft_agreement is not None:
        say(f"{'first drafts agree':<22} {100 * conversion.draft_agreement:.1f} % of held-out tokens, untrained")
    say(f"written to {conversion.destination}")

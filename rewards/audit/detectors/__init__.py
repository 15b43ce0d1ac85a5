"""Each detector looks for one kind of fault in recorded rollouts, and yields what it finds."""

from rewards.audit.detectors import advantages, run, scores, texts, tokens
from rewards.audit.findings import Detector

DETECTORS: tuple[Detector, ...] = (
    *(scores.failures, scores.not_numbers, scores.unscored, scores.outliers, scores.ties, scores.sums, scores.means),
    advantages.advantages,  # sets the rewards that TRL did not record; what follows reads them
    *(texts.groups, texts.hacks, texts.leftovers),
    *(tokens.ids, tokens.counts, tokens.temperatures, tokens.prefixes, tokens.ends, tokens.denominators),
    *(run.order, run.duplicates, run.skipped, run.stale, run.leakage, run.drift),
)
# What a part of the steps can tell, too, without what the metrics of a run tell better.
OF_SAMPLE = tuple(
    detector
    for detector in DETECTORS
    if detector not in (scores.ties, scores.means, run.order, run.duplicates, run.skipped, run.stale)
)

"""How far counts are from what probabilities let expect."""

import math
from collections import Counter
from collections.abc import Mapping


def z_score(counts: Counter, probabilities: Mapping[tuple, float]) -> float:
    """Chi-square as standard deviations from its mean. What is expected fewer than eight times counts as one cell."""
    total = counts.total()
    cells = [(counts[ids], p * total) for ids, p in probabilities.items() if p * total >= 8]
    cells.append((total - sum(n for n, _ in cells), total - sum(mean for _, mean in cells)))
    freedom = len(cells) - 1
    return (sum((n - mean) ** 2 / mean for n, mean in cells) - freedom) / math.sqrt(2 * freedom)

"""DPO (Rafailov et al. 2023) from recorded pairs, lines of {"prompt": ..., "chosen": ..., "rejected": ...}.

The reference is the frozen base of the adapters, so the configuration needs `lora`.
"""

import json
import sys
from pathlib import Path

import torch
from torch.nn.functional import logsigmoid

from grpo import Session, TrainConfig


def dpo(policy, reference):
    """The loss from the log-probabilities of all completions, [Lc] each: a chosen and a rejected one in turn."""
    gains = torch.stack([(p - r).sum() for p, r in zip(policy, reference, strict=True)])
    return -logsigmoid(0.1 * (gains[0::2] - gains[1::2])).mean()


pairs = [json.loads(line) for line in Path(sys.argv[3]).read_text().splitlines()]
with Session.open(TrainConfig.read(sys.argv[1], output_dir=sys.argv[2])) as session:
    for step in session.run.steps():
        some = [pairs[(8 * step + i) % len(pairs)] for i in range(8)]
        groups = [session.group(pair["prompt"], [pair["chosen"], pair["rejected"]]) for pair in some]
        metrics = session.forward_backward(session.prepare(groups), dpo) | session.optim_step()
        session.record(step, metrics)
    print(session.finish())

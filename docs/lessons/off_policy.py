"""Why off-policy hurts and what corrects it: python docs/lessons/off_policy.py (a minute). It prints the numbers
and draws the picture of docs/lessons/off-policy.md."""

import sys
import tempfile
from pathlib import Path
from statistics import fmean

import torch
from backward import BLUE, GREEN, GREY, IMAGES, ORANGE, chances, half_taught, two_axes

RATE = 2e-4


def uncorrected(logprobs, sampling_logprobs, advantages, mask):
    """REINFORCE: as if the policy of now had sampled the batch."""
    return -advantages * logprobs


def weighted(logprobs, sampling_logprobs, advantages, mask):
    """Each token counts as much as the policy of now would sample it more often than the sampler has."""
    return -advantages * (logprobs - sampling_logprobs).exp()


def clipped(logprobs, sampling_logprobs, advantages, mask):
    """The same, and a token that has moved by 20 % for its advantage moves no further (PPO)."""
    ratio = (logprobs - sampling_logprobs).exp()
    return -torch.min(advantages * ratio, advantages * ratio.clamp(0.8, 1.2))


LOSSES = {uncorrected: ORANGE, weighted: GREEN, clipped: BLUE}


def distance(session, groups):
    """How many nats a sampled token has become less likely in the mean: an estimate of the KL divergence."""
    ids = [[completion.token_ids for completion in group.completions] for group in groups]
    now = session.logprobs([group.prompt for group in groups], ids)
    changes = []
    for group, of_group in zip(groups, now, strict=True):
        for completion, logprobs in zip(group.completions, of_group, strict=True):
            changes += [old - float(new) for old, new in zip(completion.logprobs, logprobs, strict=True)]
    return fmean(changes)


def main(folder, small=False):
    with half_taught(folder, chance=0.2 if small else 0.5) as session:
        others = session.prompts(2, count=4 if small else 64)
        groups = session.sample(session.prompts(1, count=4 if small else 32), step=1)  # all that is learned from
        batch = session.prepare(groups, session.score(groups))
        curves, start = {}, session.save(folder / "start")
        for loss in LOSSES:
            session.load(start)
            curves[loss.__name__] = curve = []
            for update in range(3 if small else 17):
                if update:
                    session.forward_backward(batch, loss)
                    session.optim_step(RATE)
                curve.append((fmean(chances(session, others)), distance(session, groups)))
                if update in (0, 1, 4, 16):
                    print(f"{loss.__name__}, updates: {update}, right: %.3f, nats a token away: %.3f" % curve[-1])
    return curves


def draw(curves, picture):
    figure, left, right = two_axes()
    for (name, curve), color in zip(curves.items(), LOSSES.values(), strict=True):
        left.plot([chance for chance, _ in curve], color=color, label=name)
        right.plot([moved for _, moved in curve], color=color)
    for one, title in ((left, "Chance of a right answer, other prompts"), (right, "Nats a token from the sampler")):
        one.set_title(title, loc="left", fontsize=10)
        one.set_xlabel("updates on one and the same batch", color=GREY)
    left.legend(frameon=False, fontsize=8)
    figure.savefig(picture)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        result = main(Path(folder) / "lesson", small="--small" in sys.argv)
    if "--small" not in sys.argv:
        draw(result, IMAGES / "off_policy.png")

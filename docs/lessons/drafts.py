"""Drafts that change nothing: python docs/lessons/drafts.py (a minute). It prints the numbers and draws the picture
of docs/lessons/drafts.md."""

import sys
import tempfile
from pathlib import Path

import torch
from backward import BLUE, GREY, IMAGES, ORANGE, half_taught, two_axes

DEPTHS = (0, 1, 2, 3)


def sampled(session, prompts, depth):
    """The ids of all completions, the tokens that a forward of the policy gave, and what was accepted by depth."""
    groups = session.sample(prompts, step=1, draft_tokens=depth)
    completions = [completion for group in groups for completion in group.completions]
    drafts = [completion.draft for completion in completions]
    tokens = sum(len(completion.token_ids) - 1 for completion in completions)  # the prompt's forward gives the first
    made = [sum(of_one.drafted[d] for of_one in drafts) for d in range(depth)]
    accepted = [sum(of_one.accepted[d] for of_one in drafts) / made[d] for d in range(depth)]
    return [one.token_ids for one in completions], tokens / sum(one.target_forwards for one in drafts), accepted


def spoil(session):
    """Noise on every matrix of the draft head. The policy proper stays what it was."""
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in session.policy.mtp.parameters():
            if weight.requires_grad and weight.dim() > 1:
                weight.add_(torch.randn_like(weight), alpha=float(weight.std()))


def main(folder, small=False):
    gains = {"taught": [], "spoiled": []}
    with half_taught(folder, digits=6, chance=0 if small else 0.5, mtp={"depth": 3}) as session:
        prompts = session.prompts(1, count=2 if small else 16)
        plain, _, _ = sampled(session, prompts, 0)
        for name in gains:
            if name == "spoiled":
                spoil(session)
                session.load(session.save(folder / "spoiled"))  # so that the samplers have it
            for depth in DEPTHS:
                token_ids, gain, accepted = sampled(session, prompts, depth)
                gains[name].append((gain, accepted))
                same = sum(one == other for one, other in zip(token_ids, plain, strict=True))
                shares = ", ".join(f"{share:.2f}" for share in accepted) or "-"
                print(f"{name} draft head, drafts: {depth}, completions that differ: {len(plain) - same}", end=", ")
                print(f"tokens a forward: {gain:.2f}, accepted by depth: {shares}")
    return gains


def draw(gains, picture):
    figure, left, right = two_axes()
    for (name, of_depth), color, shift in zip(gains.items(), (BLUE, ORANGE), (-0.2, 0.2), strict=True):
        left.bar([depth + shift for depth in DEPTHS], [gain for gain, _ in of_depth], 0.4, color=color, label=name)
        right.plot([1, 2, 3], of_depth[-1][1], "o-", color=color)
    left.set_title("Tokens a forward of the policy", loc="left", fontsize=10)
    left.set_xlabel("drafts a round; all bars: the same tokens", color=GREY)
    left.legend(frameon=False, fontsize=8, title="draft head", title_fontsize=8)
    right.set_title("Share of drafts that were accepted", loc="left", fontsize=10)
    right.set_xlabel("depth of the draft, of 3", color=GREY)
    right.set_ylim(0, 1)
    right.set_xticks([1, 2, 3])
    figure.savefig(picture)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        result = main(Path(folder) / "lesson", small="--small" in sys.argv)
    if "--small" not in sys.argv:
        draw(result, IMAGES / "drafts.png")

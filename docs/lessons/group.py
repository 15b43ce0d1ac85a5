"""What a group teaches: python docs/lessons/group.py (a minute). It prints the numbers and draws the picture of
docs/lessons/group.md."""

import sys
import tempfile
from pathlib import Path
from statistics import fmean

from backward import BLUE, GREY, IMAGES, ORANGE, chances, half_taught, two_axes

GROUP, RATE = 8, 3e-4
SIZES = (2, 4, 8, 16)


def one_step_each(session, groups, scores, others, folder, most):
    """What a step on one group alone changes, by how many of the group are right: the chance of a right answer to its
    own prompt, and to other prompts. The policy goes back to where it was after each."""
    start = session.save(folder / "start")
    others_before = fmean(chances(session, others))
    changes = {}
    for right in range(GROUP + 1):
        numbers = [i for i, score in enumerate(scores) if sum(score.rewards) == right][:most]
        own, elsewhere = [], []
        for i in numbers:
            session.load(start)
            [own_before] = chances(session, [groups[i].prompt])  # alone, as after the step, so that both round alike
            session.forward_backward(session.prepare([groups[i]], [scores[i]]))
            session.optim_step(RATE)
            own.append(chances(session, [groups[i].prompt])[0] - own_before)
            elsewhere.append(fmean(chances(session, others)) - others_before)
        if numbers:
            changes[right] = fmean(own), fmean(elsewhere), len(numbers)
    session.load(start)
    return changes


def mixed(scores):
    return fmean(0 < sum(score.rewards) < len(score.rewards) for score in scores)


def main(folder, small=False):
    with half_taught(folder, chance=0 if small else 0.5) as session:
        prompts = session.prompts(1, count=8 if small else 160)
        others = session.prompts(2, count=4 if small else 64)
        groups = session.sample(prompts, step=1, group_size=GROUP)
        changes = one_step_each(session, groups, session.score(groups), others, folder, 1 if small else 4)
        for right, (own, elsewhere, count) in changes.items():
            print(f"{right} of {GROUP} right: own prompt {own:+.3f}, other prompts {elsewhere:+.4f} ({count} groups)")
        p = chances(session, prompts)
        predicted = [fmean(1 - q**size - (1 - q) ** size for q in p) for size in SIZES]
        drawn = [mixed(session.score(session.sample(prompts, step=2, group_size=size))) for size in SIZES]
        print(f"mean chance of a right answer: {fmean(p):.3f}")
        for size, one, two in zip(SIZES, predicted, drawn, strict=True):
            told = f"{one:.2f} should be mixed, {two:.2f} were; in 256 completions {256 / size * two:.0f} groups"
            print(f"groups of {size}: {told}")
    return changes, predicted, drawn


def draw(changes, predicted, drawn, picture):
    figure, left, right = two_axes()
    left.bar([k - 0.2 for k in changes], [own for own, _, _ in changes.values()], 0.4, color=BLUE, label="its prompt")
    left.bar([k + 0.2 for k in changes], [other for _, other, _ in changes.values()], 0.4, color=ORANGE, label="others")
    left.set_title("One step on one group: change of the chance", loc="left", fontsize=10)
    left.set_xlabel(f"right answers among the {GROUP}", color=GREY)
    left.legend(frameon=False, fontsize=8)
    right.plot(SIZES, predicted, color=GREY, label="1 - p^G - (1 - p)^G, mean over prompts")
    right.plot(SIZES, drawn, "o", color=BLUE, label="sampled")
    right.set_title("Share of groups that teach anything", loc="left", fontsize=10)
    right.set_xlabel("completions in a group, G", color=GREY)
    right.set_ylim(0, 1)
    right.legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(picture)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        numbers = main(Path(folder) / "lesson", small="--small" in sys.argv)
    if "--small" not in sys.argv:
        draw(*numbers, IMAGES / "group.png")

"""What `quartet control` writes, for tests: its shape, with numbers that are easy to follow."""

import json

from review.readers.run_folder import CONTROL

PROBLEMS = 512


def figures(accuracy):
    return {"accuracy": accuracy, "interval_95": [accuracy - 0.04, accuracy + 0.04], "reward_mean": accuracy}


def rewards(mean):
    return {"accuracy": None, "interval_95": None, "reward_mean": mean}


def difference(value, half=0.05):
    bounds = {"low": None, "high": None} if half is None else {"low": value - half, "high": value + half}
    return {"value": value, **bounds, "problems": PROBLEMS, "unpaired": None}


def points(*accuracies, every=30.0):
    rows = enumerate(accuracies)
    return [{"step": 20 * i, "seconds": every * i, "problems": 512.0, "sampled": a, "greedy": a} for i, a in rows]


def chosen(name, kind, seconds, curve):
    return {
        "name": name,
        "kind": kind,
        "words": f"words of {name}",
        "steps": 100,
        "seconds": seconds,
        "best_step": 40,
        "validation": 0.5,
        "curve": curve,
    }


def control_result(grpo=0.9, supervised=0.5, rejection=0.8, of=figures, half=0.05):
    """A run of 60 s after an SFT stage of 30 s. Greedy answers are 0.01 better."""
    values = {"start": 0.3, "grpo": grpo, "supervised": supervised, "rejection": rejection}
    minus = {kind: difference(grpo - value, half) for kind, value in values.items() if kind != "grpo"}
    return {
        "run": "runs/demo",
        "seed": 0,
        "seconds": {"grpo": 60.0, "start": 30.0},
        "problems": PROBLEMS,
        "chosen": {
            "supervised": chosen("supervised_0.001", "supervised", 61.0, points(0.3, 0.4, supervised)),
            "rejection": chosen("rejection", "rejection", 59.0, points(0.3, 0.6, rejection)),
        },
        "grpo_curve": points(0.3, 0.7, grpo),
        "results": {kind: {"sampled": of(value), "greedy": of(value + 0.01)} for kind, value in values.items()},
        "grpo_minus": {kind: {"sampled": pair, "greedy": pair} for kind, pair in minus.items()},
        "environment": {},
    }


def from_the_beginning(result):
    """The best supervised control began before the SFT stage: it has its 30 s too."""
    whole = chosen("supervised_whole", "supervised", 90.0, points(0.0, 0.2, 0.4, 0.5, every=29.0))
    return result | {"chosen": result["chosen"] | {"supervised": whole}}


def write_control(folder, result):
    path = folder / CONTROL
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result))
    return path

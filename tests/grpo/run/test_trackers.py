"""The table of rollouts in the trackers that have tables; the libraries themselves were tried by hand, see the docs."""

import sys
from types import SimpleNamespace

import pytest

from grpo.run.trackers import log_rollouts

LINES = [
    {"prompt_id": "p/0", "sample": 0, "prompt": "2 + 2", "text": "4", "reward": 1.0, "advantage": 0.5}
    | {"finish_reason": "stop", "token_ids": [7]},
    {"prompt_id": "p/0", "sample": 1, "prompt": "2 + 2", "text": "\ud800", "reward": None, "advantage": [1.0, 2.0]}
    | {"finish_reason": "length", "token_ids": [8, 9]},
]
COLUMNS = ["prompt_id", "sample", "prompt", "completion", "reward", "advantage", "finish_reason"]
ROWS = [["p/0", 0, "2 + 2", "4", 1.0, 0.5, "stop"], ["p/0", 1, "2 + 2", "?", None, 1.5, "length"]]


class Tracker:
    def __init__(self, name):
        self.name, self.told = name, []

    def log(self, values, step):
        self.told.append((values, step))

    def log_table(self, name, columns, data, step):
        self.told.append((name, columns, data, step))


def test_wandb_gets_a_table_and_tensorboard_has_none():
    wandb, board = Tracker("wandb"), Tracker("tensorboard")
    for tracker in (wandb, board):
        log_rollouts(tracker, 7, LINES)
    assert wandb.told == [("rollouts", COLUMNS, ROWS, 7)]
    assert board.told == []


def test_trackio_gets_a_table(monkeypatch):
    pytest.importorskip("pandas")
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(Table=lambda dataframe: dataframe))
    trackio = Tracker("trackio")
    log_rollouts(trackio, 7, LINES)
    [(values, step)] = trackio.told
    assert (list(values["rollouts"].columns), step) == (COLUMNS, 7)
    assert [values["rollouts"].iloc[0].tolist(), values["rollouts"]["completion"].tolist()] == [ROWS[0], ["4", "?"]]


def test_mlflow_gets_a_file_for_each_step(monkeypatch):
    told = []
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(log_table=lambda *words: told.append(words)))
    log_rollouts(Tracker("mlflow"), 7, LINES)
    columns = {name: list(values) for name, values in zip(COLUMNS, zip(*ROWS, strict=True), strict=True)}
    assert told == [(columns, "rollouts/step_000007.json")]

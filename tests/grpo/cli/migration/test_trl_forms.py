"""The forms that TRL's own scripts have, small: what each becomes, or why it is refused."""

import json

import pytest

from grpo.cli.migration.trl_script import read_trl_script
from grpo.config.run import TrainConfig

HEAD = """
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

def rows_of(**columns):
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": f"{i} + 1?"}] for i in range(4)], **columns})

def after_hashes(completions, reference_answer, **_):
    return [float(c[-1]["content"].endswith(f"#### {r}")) for c, r in zip(completions, reference_answer)]

def brief(completions, **_):
    return [1 / (1 + len(c[-1]["content"])) for c in completions]

def of_environments(environments, **_):
    return [environment.score for environment in environments]

class Counter:
    def reset(self, **_):
        self.score = 0.0

    def add(self, number: int) -> str:
        '''Adds.

        Args:
            number: what to add
        '''
        self.score += number
        return str(self.score)

class ScoredCounter(Counter):
    def get_reward(self):
        return self.score

def main():
"""
TRAINS = "    trainer = GRPOTrainer('nobody/nothing', args=GRPOConfig(max_steps=2), {})\n    trainer.train()\n"
GUARD = "\nif __name__ == '__main__':\n    main()\n"


@pytest.fixture
def read(copied_scripts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def migrate(arguments: str, end: str = GUARD):
        script = tmp_path / "train.py"
        script.write_text(HEAD + TRAINS.format(arguments) + end)
        return read_trl_script(script, tmp_path / "data")

    return migrate


def first_row(folder) -> dict:
    return json.loads((folder / "data/train.jsonl").read_text().splitlines()[0])


@pytest.mark.parametrize("end", [GUARD, "\nmain()\n"])
def test_the_reference_answer_is_the_column_that_a_reward_reads(read, tmp_path, end):
    rows = "train_dataset=rows_of(answer=['long'] * 4, reference_answer=['1', '2', '3', '4'])"
    config = TrainConfig(**read(f"reward_funcs=[after_hashes, brief], {rows}", end).tree)
    assert config.data[0].solution_column == "gold_text"
    assert first_row(tmp_path)["gold_text"] == "1"
    assert [reward.function.rpartition(":")[2] for reward in config.rewards] == ["after_hashes", "brief"]


@pytest.mark.parametrize("columns", ["", "note=['a'] * 4", "answer=['1', '', None, '4']"])
def test_no_reference_answer_is_made_up(read, tmp_path, columns):
    config = TrainConfig(**read(f"reward_funcs=brief, train_dataset=rows_of({columns})").tree)
    assert config.data[0].solution_column is None
    assert "(none)" not in (tmp_path / "data/train.jsonl").read_text()


def test_an_answer_of_zero_is_an_answer(read, tmp_path):
    config = TrainConfig(**read("reward_funcs=brief, train_dataset=rows_of(answer=[0, 1, 2, 3])").tree)
    assert config.data[0].solution_column == "gold_text"
    assert first_row(tmp_path) | {"prompt": None} == {"prompt": None, "answer": 0, "gold_text": "0"}


def test_an_environment_that_scores_itself(read):
    config = TrainConfig(**read("train_dataset=rows_of(), environment_factory=ScoredCounter").tree)
    assert (config.environment, config.rewards) == ("train.py:ScoredCounter", [])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (
            "reward_funcs=of_environments, train_dataset=rows_of(), environment_factory=Counter",
            r"a reward reads `environments`.*get_reward\(self\)",
        ),
        ("reward_funcs=brief, train_dataset=rows_of(image=['cat.png'] * 4)", "its rows have pictures"),
        ("reward_funcs=brief", "train_dataset: the trainer has none"),
    ],
)
def test_what_cannot_run_is_refused(read, arguments, reason):
    with pytest.raises(ValueError, match=f"(?s){reason}"):
        read(arguments)


def test_another_trainer_is_named(copied_scripts, tmp_path):
    script = tmp_path / "train.py"
    script.write_text("class AsyncGRPOTrainer: ...\ntrainer = AsyncGRPOTrainer()\n")
    with pytest.raises(ValueError, match="AsyncGRPOTrainer is not read"):
        read_trl_script(script, tmp_path / "data")

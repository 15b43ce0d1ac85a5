"""The tables of names: what is on the left exists in TRL, peft and verl, what is on the right exists here."""

import dataclasses
import inspect
import runpy
from pathlib import Path

import pytest
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from grpo.cli.migration.migration import Migration, our_defaults, reason_of, tables
from grpo.config.run import TrainConfig
from rewards.config.options import _options

ROOT = Path(__file__).parents[4]
GONE = {"warmup_ratio"}  # transformers 4 had it
FIELDS = {field.name for field in dataclasses.fields(GRPOConfig)}
VERL = set((ROOT / "tests/cases/verl_names.txt").read_text().split())  # of _generated_ppo_trainer.yaml, by whole path
OURS = ("trl_same", "trl_converted", "trainer", "lora", "verl_same", "verl_converted")


def test_every_name_of_theirs_is_there():
    assert {*tables()["trl_same"], *tables()["trl_converted"]} - FIELDS == GONE
    assert set(tables()["trainer"]) <= set(inspect.signature(GRPOTrainer.__init__).parameters)
    assert set(tables()["lora"]) <= {field.name for field in dataclasses.fields(LoraConfig)}
    of_verl = {*tables()["verl_same"], *tables()["verl_converted"], *tables()["verl_defaults"]}
    of_verl |= {*tables()["verl_renamed"], *tables()["verl_renamed"].values()}
    assert len(VERL) > 500
    assert of_verl - VERL == set()


def test_every_option_of_ours_is_there_and_takes_the_values_of_its_row():
    known = {option.key: option for option in _options(TrainConfig.model_construct())}
    for name in OURS:
        assert set(tables()[name].values()) <= set(known), name
    rows = {**tables()["trl_same"], **tables()["verl_same"]}
    for name, values in tables()["values"].items():
        for value in values.values():
            migration = Migration("")
            migration.put(rows[name], value)
            TrainConfig(output_dir="x", **migration.options)


def test_every_table_of_values_begins_with_the_default_of_theirs():
    defaults = {field.name: field.default for field in dataclasses.fields(GRPOConfig)} | tables()["verl_defaults"]
    for name, values in tables()["values"].items():
        default = getattr(defaults[name], "value", defaults[name])
        assert default in values, name


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_every_other_field_of_trls_has_a_reason(name):
    """So that nothing that a script sets is lost without a word."""
    if name in our_defaults() or name in {*tables()["trl_same"], *tables()["trl_converted"]}:
        return
    assert reason_of(name) != "no option here has this meaning"


def test_the_page_shows_the_tables():
    page = runpy.run_path(str(ROOT / "docs/write_migrate.py"))["page"]
    assert (ROOT / "docs/guides/migrate.md").read_text(encoding="utf-8") == page(), "run `make reference`"

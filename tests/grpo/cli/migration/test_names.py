"""The tables of names: what is on the left exists in TRL, peft and verl, what is on the right exists here."""

import dataclasses
import inspect
import runpy
from pathlib import Path

import pytest
import yaml
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from grpo.cli.migration.migration import Migration, carried, our_defaults, reason_of
from grpo.config.run import TrainConfig
from rewards.config.names import ours, trainers
from rewards.config.options import _options

ROOT = Path(__file__).parents[4]
GONE = {"warmup_ratio"}  # transformers 4 had it
FIELDS = {field.name for field in dataclasses.fields(GRPOConfig)}
VERL = set((ROOT / "tests/cases/verl_names.txt").read_text().split())  # of _generated_ppo_trainer.yaml, by whole path
OF_OTHER_ENGINES = {f"actor_rollout_ref.actor.optim.{name}" for name in ("lr_decay_style", "decay_type")}
KINDS = ("trl", "trainer", "lora", "verl")


def test_every_name_of_theirs_is_there():
    assert {*carried("trl")} - FIELDS == GONE
    assert {*carried("trainer")} <= set(inspect.signature(GRPOTrainer.__init__).parameters)
    assert {*carried("lora")} <= {field.name for field in dataclasses.fields(LoraConfig)}
    rows = trainers()["verl"]
    of_verl = {*carried("verl"), *(name for name, row in rows.items() if {"default", "now"} & row.keys())}
    of_verl |= {row["now"] for row in rows.values() if "now" in row}
    assert len(VERL) > 500
    assert of_verl - VERL == OF_OTHER_ENGINES


def test_every_option_of_ours_is_there_and_takes_the_values_of_its_row():
    known = {option.key: option for option in _options(TrainConfig.model_construct())}
    for name, row in ((name, trainers()[kind][name]) for kind in KINDS for name in carried(kind)):
        key = ours(row)[0]
        assert key in known, name
        for value in row.get("values", {}).values():
            migration = Migration("")
            migration.put(key, value)
            TrainConfig(output_dir="x", **migration.options)


def test_every_table_of_values_begins_with_the_default_of_theirs():
    defaults = {field.name: field.default for field in dataclasses.fields(GRPOConfig)}
    for name, row in {**trainers()["trl"], **trainers()["verl"]}.items():
        if "values" in row:
            default = defaults.get(name, row.get("default"))
            assert getattr(default, "value", default) in row["values"], name


def test_a_name_is_written_once():
    content = yaml.compose((ROOT / "rewards/config/trainers.yaml").read_text(encoding="utf-8"))
    for kind, rows in content.value:
        groups = [group for _, group in rows.value] if kind.value == "verl" else [rows]
        for group in groups:
            names = [name for key, _ in group.value for name in key.value.split(", ")]
            assert len(names) == len(set(names)), kind.value


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_every_other_field_of_trls_has_a_reason(name):
    """So that nothing that a script sets is lost without a word."""
    if name in our_defaults() or name in carried("trl"):
        return
    assert reason_of(name) != "no option here has this meaning"


def test_the_page_shows_the_tables():
    page = runpy.run_path(str(ROOT / "docs/write_migrate.py"))["page"]
    assert (ROOT / "docs/guides/migrate.md").read_text(encoding="utf-8") == page(), "run `make reference`"

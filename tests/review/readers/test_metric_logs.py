"""Curves of other trainers are read by content, and `diagnose` leaves out by name what they cannot show."""

import csv
import json
import struct

import pytest

from grpo.cli.parse import main
from review.findings.report import report
from review.readers.metric_logs import read_log
from rewards.kinds import KINDS

ROWS = [
    {"step": step, "loss": 0.1, "learning_rate": 1e-6 * step, "reward": 0.5, "rewards/mine/mean": 0.5, "entropy": 1.0}
    for step in range(1, 21)
]
OURS = {
    "step": 3,
    "loss/total": 0.1,
    "learner/learning_rate": 3e-6,
    "reward/mean": 0.5,
    "reward/part/mine": 0.5,
    "policy/entropy": 1.0,
}


def varint(value):
    more = value >> 7
    return bytes([value & 127 | 128 * (more > 0)]) + (varint(more) if more else b"")


def block(number, content):
    return varint(number << 3 | 2) + varint(len(content)) + content


def event(step, values, tensors=False):
    """An event of TensorBoard with its length and two checksums, which nobody checks."""
    content = b"\x09" + struct.pack("<d", 1.0) + varint(2 << 3) + varint(step)
    for name, value in values.items():
        scalar = struct.pack("<f", value)
        plain = varint(2 << 3 | 5) + scalar
        tensor = block(8, b"\x08\x01" + block(5, scalar))
        content += block(5, block(1, block(1, name.encode()) + (tensor if tensors else plain)))
    return struct.pack("<QI", len(content), 0) + content + bytes(4)


def write_state(folder):
    path = folder / "trainer_state.json"
    path.write_text(json.dumps({"log_history": ROWS, "max_steps": 20, "global_step": 20}))
    return path


def write_events(folder, tensors=False):
    path = folder / "events.out.tfevents.1.machine.1"
    named = [{f"train/{name}": value for name, value in row.items() if name != "step"} for row in ROWS]
    records = [event(row["step"], values, tensors) for row, values in zip(ROWS, named, strict=True)]
    path.write_bytes(b"".join(records) + records[0][:20])  # the writer was killed
    return folder


def write_tensors(folder):
    return write_events(folder, tensors=True)


def write_history(folder):
    path = folder / "history.json"
    path.write_text(json.dumps([{"_step": row["step"], "_runtime": 3.0} | row for row in ROWS]))
    return path


def write_table(folder):
    path = folder / "export.csv"
    with path.open("w", newline="") as file:
        rows = [{f"run-1 - train/{name}": value for name, value in row.items() if name != "step"} for row in ROWS]
        writer = csv.DictWriter(file, ["Step", *rows[0], "run-1 - train/reward__MIN"])
        writer.writeheader()
        for row, values in zip(ROWS, rows, strict=True):
            writer.writerow({"Step": row["step"], "run-1 - train/reward__MIN": 0.1} | values)
    return path


def write_verl(folder):
    path = folder / "verl.jsonl"
    names = {
        "loss": "actor/loss",
        "learning_rate": "actor/lr",
        "reward": "critic/score/mean",
        "entropy": "actor/entropy",
    }
    rows = [
        {"step": row["step"], "data": {names.get(name, name): value for name, value in row.items()}} for row in ROWS
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 2')
    return path


FORMS = {
    "trainer_state.json": write_state,
    "TensorBoard events": write_events,
    "TensorBoard events of tensors": write_tensors,
    "W&B history": write_history,
    "W&B history of a table": write_table,
    "verl's file logger": write_verl,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_by_its_content(tmp_path, form):
    log = read_log(FORMS[form](tmp_path))
    assert form.startswith(log.form)
    assert len(log.rows) == 20
    assert log.rows[2] == pytest.approx(OURS)
    assert log.parts == ["mine"]


@pytest.mark.parametrize("form", FORMS)
def test_what_a_log_shows_is_found_and_what_it_lacks_is_named(tmp_path, form, capsys):
    path = FORMS[form](tmp_path)
    assert main(["diagnose", str(path)]) == 1
    said = capsys.readouterr().out
    assert f"20 steps of {form.split(' of ')[0]}" in said
    assert "1. warning warmup-too-long: The rate still rises at step 20" in said
    assert "not recorded: policy/approx_kl; not looked for: rate-high, rate-low" in said
    lacking = report(path).lacking
    kinds = {kind for each in lacking.values() for kind in each}
    assert "template" in kinds
    assert "warmup-too-long" not in kinds
    assert kinds <= KINDS.keys()


def test_the_last_checkpoint_of_a_folder_is_read(tmp_path):
    for step in (9, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": ROWS[:step]}))
    assert len(read_log(tmp_path).rows) == 10


def test_evaluations_of_trl_have_our_names_in_both_of_their_forms(tmp_path):
    path = tmp_path / "history.json"
    path.write_text(json.dumps([{"_step": 1, "eval_reward": 0.4}, {"_step": 2, "eval/reward": 0.5}]))
    assert [row["eval/reward_mean"] for row in read_log(path).rows] == [0.4, 0.5]


@pytest.mark.parametrize(
    "text",
    [
        '{"step": 1, "prompt": "?", "completion": "!", "reward": 1.0}\n',
        '{"answer": 1}',
        "a,b\n1,2\n",
        "[1, 2]",
        "",
        "\0",
    ],
)
def test_what_has_no_curves_is_left_to_the_other_readers(tmp_path, text):
    path = tmp_path / "file"
    path.write_text(text)
    assert read_log(path) is None

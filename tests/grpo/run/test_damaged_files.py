"""Whatever a file of a run, of data or of a model holds: it is read, or refused in a line that names it.

`QUARTET_CHAOS=50 pytest tests/grpo/test_damaged_files.py` tries 50 times as much damage, another each time.
"""

import functools
import json
import os
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grpo.cli.actions import EXPECTED
from grpo.cli.commands.export import _read_run
from grpo.cli.commands.model_card import Origin, model_card
from grpo.cli.commands.sample import read_prompts
from grpo.cli.config.inference import defaults_of_run
from grpo.config.mtp import defaults_of_run as mtp_defaults_of_run
from grpo.config.run import LogOptions, TrainConfig
from grpo.run import checkpoint
from grpo.run.json_lines import truncate
from grpo.run.log import Resume, RunLog
from grpo.run.reward_record import read_rewards
from grpo.train import train
from policies.files.checksums import size_and_hash
from policies.layout import INDEX, WeightFiles
from policies.policy import Policy
from review.readers.machine import read_machine
from review.readers.run_folder import read_metrics
from rewards.commands.replay import _settings
from rewards.config.options import load
from rewards.config.yaml_file import changed_options
from rewards.data.examples import load_examples
from rewards.records import read_rollouts, recorded_steps
from rollout.cost_table import CostTable
from rollout.drafts.depth import DepthController

PRINTED = (ValueError, OSError, *(getattr(import_module(module), name) for module, name in EXPECTED.items()))
CHAOS = int(os.environ.get("QUARTET_CHAOS", "1"))
SETTINGS: dict[str, Any] = {
    "deadline": None,
    "derandomize": CHAOS == 1,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}

WRONG = [None, True, -1, 0, 0.5, 1e308, 10**400, 10**9, float("nan"), float("-inf"), "", "x", "\ud83d", "\x1b", [], {}]
WRONG += [[None], [[]], {"a": None}, "../../x", [1, "x"]]


def _places(value: Any, place: tuple = ()) -> list[tuple]:
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place, *(found for key, part in below for found in _places(part, (*place, key)))]


def _with(value: Any, place: tuple, change: Callable[[Any, Any], None]) -> Any:
    copy = json.loads(json.dumps(value))
    *above, last = place
    part = copy
    for key in above:
        part = part[key]
    change(part, last)
    return copy


def _mistyped(draw, document: Any) -> str:
    """A JSON text that differs from `document` in one place: another value, none, or one too deep."""
    place = draw(st.sampled_from(_places(document)))
    how = draw(st.sampled_from(["replace", "replace", "replace", "remove", "deep"]))
    wrong = draw(st.sampled_from(WRONG))
    if how == "deep":
        marked = "@deep@" if not place else _with(document, place, lambda part, key: part.__setitem__(key, "@deep@"))
        depth = draw(st.sampled_from([150, 600, 1100]))  # more than is allowed; what json may recurse is 1,000
        return json.dumps(marked).replace('"@deep@"', "[" * depth + "]" * depth)
    if not place:
        return json.dumps(wrong)
    if how == "remove":
        return json.dumps(_with(document, place, lambda part, key: part.pop(key)))
    return json.dumps(_with(document, place, lambda part, key: part.__setitem__(key, wrong)))


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """`content` cut short, emptied, overwritten, not UTF-8, or (JSON, lines of it too) with one wrong value."""
    kind = draw(st.sampled_from(["cut", "empty", "random", "flip", "not utf-8", "zeros", *["json"] * 4]))
    at = draw(st.integers(0, max(0, len(content) - 1)))
    match kind:
        case "cut":
            return content[:at]
        case "empty":
            return b""
        case "random":
            return draw(st.binary(max_size=200))
        case "flip":
            return content[:at] + bytes([content[at] ^ (1 << draw(st.integers(0, 7)))]) + content[at + 1 :]
        case "not utf-8":
            return content[:at] + b"\xff\xfe\x80" + content[at:]
        case "zeros":
            return bytes(len(content))
    lines = content.decode(errors="replace").splitlines()
    try:
        return _mistyped(draw, json.loads(content)).encode()
    except ValueError:
        pass
    number = draw(st.integers(0, max(0, len(lines) - 1)))
    try:
        lines[number] = _mistyped(draw, json.loads(lines[number]))
    except (ValueError, IndexError):
        lines[number : number + 1] = [draw(st.sampled_from(["garbage", "", "[]", "null", "{}", "x: [", "{"]))]
    return ("\n".join(lines) + "\n").encode()


def read_or_refuse(read: Callable[[], Any], name: str) -> None:
    said = name
    try:
        read()
    except PRINTED as error:
        said = f"{type(error).__name__}: {error}"
    assert name in said


@pytest.fixture(scope="module")
def run(micro_config, tmp_path_factory) -> Path:
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("run") / "run"
    train(micro_config(folder, steps=2, **{"rollout.draft_tokens": None, "sft.steps": 0}))
    with RunLog(folder, (folder / "config.yaml").read_text(), LogOptions(trackers=[]), quiet=True, resume=Resume(2)):
        pass  # a resume, whose machine events.jsonl describes
    return folder


def _card(run: Path) -> None:
    model_card(run, "name", Origin("tiny", preset=True), "the end of the run", None, run)


def _costs(run: Path) -> None:
    DepthController(CostTable.load(run / "draft_costs.json"), 4).choose(3, 4)


READERS: dict[str, list[Callable[[Path], Any]]] = {
    "metrics.jsonl": [read_metrics, _card, lambda run: truncate(run, 1)],
    "events.jsonl": [_card],
    "rewards.json": [read_rewards],
    "environment.json": [lambda run: read_machine(run / "environment.json"), _card],
    "draft_costs.json": [_costs],
    "config.yaml": [
        lambda run: load(TrainConfig, run / "config.yaml", {}),
        _card,
        defaults_of_run,
        mtp_defaults_of_run,
        _settings,
        _read_run,
        lambda run: changed_options(run / "config.yaml", "steps: 1\n"),
    ],
}


@pytest.mark.parametrize("file", READERS)
@settings(max_examples=25 * CHAOS, **SETTINGS)
@given(data=st.data())
def test_a_damaged_file_of_a_run(run, tmp_path, file, data):
    """All that reads the file reads the same damage."""
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    for path in run.iterdir():
        if path.name == "rollouts":
            shutil.copytree(path, copy / path.name)  # a resume removes some of them
        else:
            (copy / path.name).symlink_to(path)
    (copy / file).unlink()
    content = (run / file).read_bytes()
    if file == "config.yaml" and data.draw(st.booleans()):  # JSON is YAML
        content = json.dumps(load(TrainConfig, run / file, {}).model_dump(mode="json")).encode()
    (copy / file).write_bytes(data.draw(damaged(content)))
    for read in READERS[file]:
        read_or_refuse(lambda read=read: read(copy), file)


@settings(max_examples=60 * CHAOS, **SETTINGS)
@given(data=st.data())
def test_damaged_rollouts(run, tmp_path, data):
    file = "step_000001.jsonl.zst"
    (tmp_path / "rollouts").mkdir(exist_ok=True)
    content = (run / "rollouts" / file).read_bytes()
    if data.draw(st.booleans()):
        lines = zstandard.ZstdDecompressor().decompress(content)
        content = zstandard.compress(data.draw(damaged(b"\n".join(lines.split(b"\n")[:2]) + b"\n")))
    else:
        content = data.draw(damaged(content))
    (tmp_path / "rollouts" / file).write_bytes(content)
    read_or_refuse(lambda: read_rollouts(tmp_path, 1), file)


def test_stray_files_beside_rollouts_are_passed_over(run, tmp_path):
    shutil.copytree(run, tmp_path / "copy")
    names = ["step_x.jsonl.zst", "step_.jsonl.zst", "step_000001.txt", "step_²", "step_1e9.jsonl.zst"]
    strays = [*names, "notes", ".DS_Store"]
    for stray in strays:
        (tmp_path / "copy/rollouts" / stray).write_text("x")
    assert recorded_steps(tmp_path / "copy") == [1, 2]
    with pytest.raises(FileNotFoundError, match="there are steps 1 to 2"):
        read_rollouts(tmp_path / "copy", 9)
    truncate(tmp_path / "copy", 1)
    assert {path.name for path in (tmp_path / "copy/rollouts").iterdir()} == {"step_000001.jsonl.zst", *strays}


@pytest.mark.parametrize("rehashed", [False, True])
@settings(max_examples=25 * CHAOS, **SETTINGS)
@given(data=st.data())
def test_a_damaged_checkpoint(run, tmp_path, rehashed, data):
    """`rehashed`: the manifest agrees with the damage, as after a fault before it was written."""
    source = run / "checkpoints/step_000002"
    copy = tmp_path / "checkpoints/step_000002"
    shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
    shutil.copytree(source, copy)
    name = data.draw(st.sampled_from(sorted(path.name for path in source.iterdir())))
    (copy / name).write_bytes(data.draw(damaged((source / name).read_bytes())))
    if rehashed and name != checkpoint.MANIFEST:
        (copy / checkpoint.MANIFEST).unlink()
        files = {path.name: size_and_hash(path) for path in copy.iterdir()}
        (copy / checkpoint.MANIFEST).write_text(json.dumps({"files": files}))
    read_or_refuse(lambda: checkpoint.load(copy), "step_000002")


ROWS = [{"question": f"{i} + 1 = ?", "answer": f"#### {i + 1}", "more": {"a": [1, None]}, "x": 0.5} for i in range(3)]
CONTENTS = {  # and of the same rows a table, which is made when it is asked for
    "data.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
    "data.json": json.dumps(ROWS).encode(),
    "data.csv": b'question,answer\n"1 + 1 = ?",#### 2\n2 + 2 = ?,"#### 4"\n',
}


@functools.cache
def parquet() -> bytes:
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), table := pyarrow.BufferOutputStream())
    return table.getvalue().to_pybytes()


@pytest.mark.parametrize("file", [*CONTENTS, "data.parquet"])
@settings(max_examples=50 * CHAOS, **SETTINGS)
@given(data=st.data())
def test_damaged_data(tmp_path, file, data):
    (tmp_path / file).write_bytes(data.draw(damaged(CONTENTS.get(file) or parquet())))

    def read() -> None:
        for example in load_examples(tmp_path / file, "train"):
            json.dumps([example.question, example.solution, example.columns]).encode()
            example.question.encode()

    read_or_refuse(read, file)


@settings(max_examples=50 * CHAOS, **SETTINGS)
@given(data=st.data())
def test_damaged_prompts(tmp_path, data):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(data.draw(damaged(b'{"prompt": "2 + 3 = ?"}\n{"prompt": "a", "more": [1]}\n')))
    read_or_refuse(lambda: read_prompts(file), file.name)


CHAT = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}\n{% endfor %}"


@pytest.fixture(scope="module")
def models(random_policy, hf_policy, tmp_path_factory) -> dict[str, Path]:
    """Both kinds of policy; the native one has a draft vocabulary, and is there with an index as well."""
    import torch

    folder = tmp_path_factory.mktemp("models")
    native, other = random_policy(0), hf_policy("llama")
    native.draft_ids = torch.tensor([0, 1, 5])
    for name, policy in {"native": native, "other": other}.items():
        policy.tokenizer.chat_template = CHAT
        policy.save(folder / name)
    sharded = Path(shutil.copytree(folder / "native", folder / "sharded"))
    names = WeightFiles(sharded).shapes
    shard = (sharded / "model.safetensors").rename(sharded / "model-00001-of-00001.safetensors")
    (sharded / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, shard.name)}))
    return {name: folder / name for name in ("native", "other", "sharded")}


FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")


def _use(folder: Path) -> None:
    policy = Policy.load(folder)
    assert policy.stop_token_ids is not None
    assert policy.max_length > 0
    policy.tokenizer.encode("2 + 3 = ?")


CASES = [(kind, file) for kind in ("native", "other") for file in FILES]


@pytest.mark.parametrize(("kind", "file"), [*CASES, ("native", "draft_vocabulary.json"), ("sharded", INDEX)])
@settings(max_examples=6 * CHAOS, **SETTINGS)
@given(data=st.data())
def test_a_damaged_file_of_a_model(models, tmp_path, kind, file, data):
    copy = tmp_path / "model"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(models[kind], copy)
    (copy / file).write_bytes(data.draw(damaged((models[kind] / file).read_bytes())))
    read_or_refuse(lambda: _use(copy), str(copy))

"""`quartet convert` from the command line: every form on disk, its report, refusals, and nothing half written; and the
text that it reads."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from grpo.cli.commands import convert as convert_command
from grpo.cli.parse import main
from grpo.data.calibration_text import calibration_text
from policies.conversion.parity import ParityFailed
from policies.policy import Policy
from policies.presets import small_tokenizer
from rewards.data.word_problems import word_problems

SMALL = ["--calibrate_tokens", "640", "--held_out_tokens", "128", "--threads", "1"]


@pytest.fixture(autouse=True)
def short_windows(monkeypatch) -> None:
    monkeypatch.setattr(convert_command, "WINDOW", 32)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [f"{row['question']}\n{row['answer']}\n" for row in word_problems("train", [1, 2], count=120)]


@pytest.fixture(scope="module")
def source(texts, tmp_path_factory) -> str:
    """A Llama of two layers with grouped queries and a tied head, briefly trained on the text that lies beside it."""
    folder = tmp_path_factory.mktemp("convert") / "dense"
    tokenizer = small_tokenizer(texts, 300)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, initializer_range=0.2, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    ids = [i for text in texts for i in (*tokenizer(text).input_ids, 0)]
    blocks = torch.tensor(ids[: len(ids) // 32 * 32]).view(-1, 32)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(80):
        rows = blocks[torch.arange(8 * step, 8 * step + 8) % len(blocks)]
        model(rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "LICENSE").write_text("do as you like")
    (folder.parent / "text.txt").write_text("".join(texts))
    return str(folder)


@pytest.fixture
def text(source) -> str:
    return str(Path(source).parent / "text.txt")


@pytest.fixture
def convert(source, tmp_path) -> Callable[..., tuple[Path, dict]]:
    """`convert("--mtp")`: (the folder written, the report as JSON)."""

    def run(*words: str) -> tuple[Path, dict]:
        destination, report = tmp_path / "new" / "policy", tmp_path / "report.json"
        assert main(["convert", source, str(destination), "--threads", "1", "--json", str(report), *words]) == 0
        assert [path.name for path in destination.parent.iterdir()] == ["policy"]
        return destination, json.loads(report.read_text())

    return run


@pytest.fixture
def logits(source, texts) -> Callable[[object], torch.Tensor]:
    ids = AutoTokenizer.from_pretrained(source)(texts[3], return_tensors="pt").input_ids[:, :48]

    def of(model) -> torch.Tensor:
        with torch.no_grad():
            return (AutoModelForCausalLM.from_pretrained(model) if isinstance(model, str | Path) else model)(ids).logits

    return of


@pytest.mark.slow
def test_the_exact_form_says_so_and_is_the_dense_model_and_noise_is_reported(convert, logits, source, capsys):
    folder, report = convert()
    expected = logits(source)
    assert (logits(folder) - expected).abs().max() <= 1e-3 * expected.abs().max()
    shown = capsys.readouterr().out
    for line in (r"max logit difference", "greedy text identical  yes", "parity                 passed", "LICENSE"):
        assert line in shown or (folder / line).is_file()
    assert report["parity"]["greedy_identical"]
    assert report["against"] == "the dense model"
    assert report["draft_agreement"] is None
    shutil.rmtree(folder.parent)
    folder, report = convert("--ffn", "moe", "--experts.shared_experts", "1", "--experts.noise", "0.05")
    assert report["against"] == "the policy with noise"
    assert report["parity"]["greedy_identical"]
    assert report["noise"]["max_logit_difference"] > 0.01
    assert (logits(folder) - expected).abs().max() > 0.01
    assert "noise on the experts" in capsys.readouterr().out


def test_experts_are_on_disk_and_their_router_learns(convert, logits, source):
    folder, report = convert("--ffn", "moe", "--experts.expert_groups", "3", "--experts.shared_experts", "1")
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert {n for n in names if ".experts." in n} == {
        f"model.layers.1.mlp.experts.{e}.{part}_proj.weight" for e in range(6) for part in ("gate", "up", "down")
    }
    expected = logits(source)
    assert (logits(folder) - expected).abs().max() <= 1e-3 * expected.abs().max()
    assert report["parity"]["max_logit_difference"] <= 1e-3 * report["parity"]["max_logit"]
    policy = Policy.load(folder)
    ids = torch.arange(5, 45)[None]
    policy.trunk(ids, labels=ids).loss.backward()
    gradient = policy.trunk.model.layers[1].mlp.gate.weight.grad
    assert gradient.abs().max() > 1e-6


@pytest.mark.slow
def test_a_draft_head_beats_chance_with_given_text_and_with_its_own(convert, text, tmp_path):
    folder, report = convert("--mtp", "--calibrate", text, *SMALL)
    assert Policy.load(folder).mtp is not None
    assert Policy.load(folder).config.num_nextn_predict_layers == 1
    assert report["draft_agreement"] > 0.2  # of 300 tokens
    (tmp_path / "new" / "policy").rename(tmp_path / "first")
    folder, report = convert("--mtp")
    assert Policy.load(folder).mtp is not None
    assert report["draft_agreement"] > 0.1


@pytest.mark.slow
def test_everything_at_once(convert, text, logits):
    words = ["--ffn", "moe", "--experts.shared_experts", "1", "--mtp"]
    folder, report = convert(*words, "--calibrate", text, *SMALL)
    policy = Policy.load(folder)
    assert policy.mtp is not None
    assert policy.config.n_routed_experts == 8
    assert report["against"] == "the dense model"
    assert torch.equal(logits(policy.trunk), logits(folder))


STEPS = ("calibration_text", "load_dense", "convert_dense", "shard_feed_forward", "start_head", "save_as", "parity")


@pytest.mark.parametrize("step", STEPS)
def test_nothing_is_left_wherever_it_ends(source, text, tmp_path, monkeypatch, capsys, step):
    interruption = (OSError, KeyboardInterrupt, ParityFailed)[STEPS.index(step) % 3]

    def stop(*_: object, **__: object) -> None:
        raise interruption("no space left")

    monkeypatch.setattr(convert_command, step, stop)
    words = ["--ffn", "moe", "--experts.shared_experts", "1", "--mtp"]
    code = main(["convert", source, str(tmp_path / "new/policy"), "--calibrate", text, *SMALL, *words])
    assert code == (130 if interruption is KeyboardInterrupt else 1)
    assert list((tmp_path / "new").iterdir()) == []
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--calibrate", "{text}"], "calibrate=.* is for --mtp"),
        (["--mtp", "--calibrate", "{dir}/none.txt"], "none.txt"),
        (["--mtp", "--calibrate", "{dir}/short.txt"], r"short.txt' holds \d+ tokens, and two windows .* longer"),
        (["--mtp", "--calibrate", "{dir}/binary.txt"], "binary.txt' is not text in UTF-8"),
        (["--experts.noise", "0.1"], "add --ffn moe"),
        (["--ffn", "moe", "--experts.shared_experts", "4", "--experts.experts_per_group", "3"],
         "intermediate_size=96 .* multiple of shared_experts \\+ experts_per_group = 7; sums that divide it are 3, 4"),
        (["--ffn", "moe", "--experts.dense_layers", "2"], "dense_layers=2 leaves no layer of num_hidden_layers=2"),
        (["--ffn", "mow"], "mow"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name_before_a_weight_is_read(
    source, text, tmp_path, monkeypatch, capsys, words, message
):
    (tmp_path / "short.txt").write_text("2 + 2 = 4")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe" * 500)
    monkeypatch.setattr(convert_command, "load_dense", lambda *_: pytest.fail("weights were read"))
    words = [word.replace("{text}", text).replace("{dir}", str(tmp_path)) for word in words]
    assert main(["convert", source, str(tmp_path / "new/policy"), *words]) in (1, 2)
    shown = capsys.readouterr().err
    assert re.search(message, shown), shown
    assert "Traceback" not in shown
    assert not (tmp_path / "new").exists() or list((tmp_path / "new").iterdir()) == []


# The text.


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer(["3 + 4 = 7\n", "how many apples are left?\n"])


def test_windows_stand_side_by_side_and_the_last_are_held_out(tokenizer, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("3 + 4 = 7\n" * 40)
    ids = [*tokenizer(file.read_text()).input_ids, tokenizer.eos_token_id]
    found = calibration_text(str(file), tokenizer, tokens=24, held_out_tokens=10, window=8)
    rows = [row.tolist() for row in [*found.windows, *found.held_out]]
    assert (len(found.windows), len(found.held_out)) == (4, 1)  # 3 + 2 asked for, at most a fifth held out
    assert rows == [ids[i : i + 8] for i in range(0, 40, 8)]
    few = calibration_text(str(file), tokenizer, tokens=10**6, held_out_tokens=10**6, window=8)
    count = len(ids) // 8
    assert (len(few.windows), len(few.held_out)) == (count - count // 5, count // 5)


def test_documents_of_a_data_file_end_with_eos_and_each_window_starts_with_bos(tokenizer, tmp_path):
    rows = [{"question": f"{i} + 4 = ?", "answer": str(i + 4)} for i in range(3, 9)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def with_bos(text: str, add_special_tokens: bool = True):
        out = tokenizer(text)
        out["input_ids"] = [2] * add_special_tokens + out["input_ids"]
        return out

    with_bos.bos_token_id, with_bos.eos_token_id = 2, tokenizer.eos_token_id
    found = calibration_text(str(tmp_path / "data.jsonl"), with_bos, tokens=10**6, held_out_tokens=8, window=8)
    every = [*found.windows, *found.held_out]
    assert {(row[0].item(), len(row)) for row in every} == {(2, 8)}
    ids = [
        i for row in rows for i in (*tokenizer(f"{row['question']}\n{row['answer']}").input_ids, with_bos.eos_token_id)
    ]
    assert [i for row in every for i in row[1:].tolist()] == ids[: 7 * len(every)]

"""KL distillation after compression: what moves, what stays, how it ends; and the text that it reads."""

from __future__ import annotations

import json
import math
import signal

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from grpo.cli.commands import recovery
from grpo.cli.commands.recovery import RecoveryDiverged, recover
from grpo.cli.config.convert import RecoveryOptions
from grpo.data.calibration_text import calibration_text
from policies.conversion.calibration import observe
from policies.conversion.compress import compress
from policies.conversion.parity import fidelity
from policies.layout import frozen_parameter_names
from policies.presets import small_tokenizer

torch.set_num_threads(1)
OPTIONS = RecoveryOptions(learning_rate=3e-3)


@pytest.fixture(autouse=True)
def small_updates(monkeypatch):
    monkeypatch.setattr(recovery, "WINDOWS_PER_STEP", 2)
    monkeypatch.setattr(recovery, "WARM_UP", 1)


@pytest.fixture
def pair():
    """(student, dense, windows): a small Llama and what is left of it in half the cache."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    dense = LlamaForCausalLM(config).eval()
    windows = list(torch.randint(60, (6, 24)))
    student, _ = compress(dense, observe(dense, windows), 20)
    return student, dense, windows


def copies(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("trained", ["attention", "all"])
def test_only_what_is_asked_for_moves_and_never_the_cancelled_norm(pair, trained):
    student, dense, windows = pair
    before, teacher = copies(student), copies(dense)
    assert recover(student, dense, windows, 2, OPTIONS.model_copy(update={"trained": trained})) == 2
    frozen = frozen_parameter_names(student.config)
    moved = {name for name, tensor in student.named_parameters() if not torch.equal(tensor, before[name])}
    names = {name for name, _ in student.named_parameters()} - set(frozen)
    wanted = {name for name in names if trained == "all" or ".self_attn." in name}
    assert moved == wanted
    assert all(torch.equal(tensor, teacher[name]) for name, tensor in dense.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in student.parameters())


def test_it_comes_nearer_and_the_first_loss_is_the_kl_of_the_windows_it_read(pair, monkeypatch):
    student, dense, windows = pair
    losses: list[float] = []
    before = fidelity(dense, student, windows)
    monkeypatch.setattr(recovery, "WINDOWS_PER_STEP", len(windows))
    recover(student, dense, windows, 30, OPTIONS, on_step=lambda step, loss: losses.append(loss))
    assert losses[0] == pytest.approx(before.kl_mean, rel=1e-4)
    assert fidelity(dense, student, windows).kl_mean < 0.5 * before.kl_mean


def test_the_seed_decides_the_order_of_the_text(pair):
    student, dense, windows = pair
    start, seen = copies(student), {}
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        student.load_state_dict(start)
        seen[name] = []
        recover(student, dense, windows, 3, OPTIONS, seed=seed, on_step=lambda *pair, n=name: seen[n].append(pair))
    assert seen["first"] == seen["again"] != seen["other"]
    assert [step for step, _ in seen["first"]] == [1, 2, 3]


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_heeded_between_two_steps_and_a_second_one_at_once(pair, kind):
    student, dense, windows = pair
    usual = signal.getsignal(kind)

    def ask(step: int, loss: float) -> None:
        if step == 2:
            signal.raise_signal(kind)
            assert signal.getsignal(kind) is usual

    assert recover(student, dense, windows, 9, OPTIONS, on_step=ask) == 2
    assert signal.getsignal(kind) is usual


def test_a_step_that_is_not_finite_is_an_error(pair):
    student, dense, windows = pair
    with torch.no_grad():
        student.model.layers[0].self_attn.q_proj.weight[0, 0] = math.nan
    with pytest.raises(
        RecoveryDiverged, match=r"step 1 of the recovery: loss nan.*use a smaller recovery.learning_rate"
    ):
        recover(student, dense, windows, 1, OPTIONS)


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

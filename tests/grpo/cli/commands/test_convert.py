"""`quartet convert` from the command line: every form on disk, its report, refusals, and nothing half written; and the
recovery after a compression, with the text that it reads."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from grpo.cli.commands import convert as convert_command
from grpo.cli.commands import recovery
from grpo.cli.commands.recovery import RecoveryDiverged, recover
from grpo.cli.config.convert import RecoveryOptions
from grpo.cli.parse import main
from grpo.data.calibration_text import calibration_text
from policies.conversion.calibration import observe
from policies.conversion.compress import compress
from policies.conversion.parity import fidelity
from policies.layout import frozen_parameter_names
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
    assert report["compression"] is report["draft_agreement"] is None
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
def test_compression_reports_cache_kl_agreement_and_perplexity_and_recovery_gives_back(convert, text, capsys):
    words = ["--rank", "20", "--calibrate", text, *SMALL]
    folder, report = convert(*words, "--recover", "25", "--recovery.learning_rate", "3e-3")
    config = Policy.load(folder).config
    assert config.kv_lora_rank + config.qk_rope_head_dim == 20
    found = report["compression"]
    before, after = found["compressed"], found["recovered"]
    assert (found["cache"], found["dense_cache"], found["steps"]) == (20, 32, 25)
    assert after["kl_mean"] < 0.8 * before["kl_mean"]
    assert after["top1_agreement"] > before["top1_agreement"]
    assert before["dense_perplexity"] == after["dense_perplexity"] != before["perplexity"]
    assert before["num_tokens"] == 128
    shown = capsys.readouterr().out
    for line in ("(−38 %)", "mean KL from dense", "top-1 agreement", "perplexity", "after 25 steps", "128 held-out"):
        assert line in shown


def test_the_reported_numbers_are_those_of_the_saved_files(convert, source, text):
    folder, report = convert("--rank", "24", "--calibrate", text, *SMALL)
    held = convert_command.calibration_text(
        text, AutoTokenizer.from_pretrained(source), tokens=640, held_out_tokens=128, window=32
    ).held_out
    dense, saved = (AutoModelForCausalLM.from_pretrained(model) for model in (source, folder))
    ids = torch.stack(held)
    with torch.no_grad():
        log_p, log_q = (model(ids).logits.log_softmax(-1) for model in (dense, saved))
    found = report["compression"]["compressed"]
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    assert found["kl_mean"] == pytest.approx(kl.item(), rel=1e-3)
    nll = -log_q[:, :-1].gather(2, ids[:, 1:, None]).mean()
    assert found["perplexity"] == pytest.approx(nll.exp().item(), rel=1e-4)


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
    words = ["--ffn", "moe", "--experts.shared_experts", "1", "--rank", "28", "--recover", "2", "--mtp"]
    folder, report = convert(*words, "--calibrate", text, *SMALL)
    policy = Policy.load(folder)
    assert policy.mtp is not None
    assert policy.config.n_routed_experts == 8
    assert report["against"] == "the compressed policy"
    assert report["compression"]["steps"] == 2
    assert torch.equal(logits(policy.trunk), logits(folder))


STEPS = ("calibration_text", "load_dense", "observe", "compress", "recover", "shard_feed_forward", "start_head")
STEPS += ("save_as", "parity")


@pytest.mark.parametrize("step", STEPS)
def test_nothing_is_left_wherever_it_ends(source, text, tmp_path, monkeypatch, capsys, step):
    interruption = (OSError, KeyboardInterrupt, recovery.RecoveryDiverged)[STEPS.index(step) % 3]

    def stop(*_: object, **__: object) -> None:
        raise interruption("no space left")

    monkeypatch.setattr(convert_command, step, stop)
    words = ["--ffn", "moe", "--experts.shared_experts", "1", "--rank", "24", "--recover", "1", "--mtp"]
    code = main(["convert", source, str(tmp_path / "new/policy"), "--calibrate", text, *SMALL, *words])
    assert code == (130 if interruption is KeyboardInterrupt else 1)
    assert list((tmp_path / "new").iterdir()) == []
    assert "Traceback" not in capsys.readouterr().err


def test_ctrl_c_in_a_recovery_keeps_what_it_has_reached(convert, text, monkeypatch, capsys):
    real = recovery.F.kl_div
    calls = []

    def interrupt(*given, **named):
        calls.append(1)
        if len(calls) == 6:  # in the second update of four windows
            signal.raise_signal(signal.SIGINT)
        return real(*given, **named)

    monkeypatch.setattr(recovery.F, "kl_div", interrupt)
    monkeypatch.setattr(convert_command, "fidelity", lambda *_: convert_command.Fidelity(0.1, 0.5, 9.0, 8.0, 32))
    folder, report = convert("--rank", "24", "--calibrate", text, *SMALL, "--recover", "9")
    assert report["compression"]["steps"] == 2
    assert "ended at step 2 of 9" in capsys.readouterr().out
    assert (folder / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rank", "20"], "rank=20 requires text to measure the model on; add --calibrate FILE"),
        (["--rank", "99", "--calibrate", "{text}"], "rank=99 is out of range: .* = 32 numbers .*; use 7 to 36"),
        (["--rank", "20", "--rotary", "18", "--calibrate", "{text}"], "rotary=18 is out of range: .* from 2 to 14"),
        (["--rank", "20", "--rotary", "5", "--calibrate", "{text}"], "rotary=5 is odd"),
        (["--rotary", "4"], "rotary=4 is for the compressed form; add --rank"),
        (["--recover", "4"], "recover=4 is for the compressed form; add --rank"),
        (["--recovery.learning_rate", "1e-3"], "add --recover STEPS"),
        (["--calibrate", "{text}"], "calibrate=.* is for --rank and --mtp"),
        (["--rank", "20", "--calibrate", "{dir}/none.txt"], "none.txt"),
        (["--rank", "20", "--calibrate", "{dir}/short.txt"], r"short.txt' holds \d+ tokens, and two windows .* longer"),
        (["--rank", "20", "--calibrate", "{dir}/binary.txt"], "binary.txt' is not text in UTF-8"),
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


@pytest.mark.parametrize(("rate", "harmful"), [pytest.param("3e-3", False, marks=pytest.mark.slow), ("1.0", True)])
def test_a_recovery_that_did_harm_says_so(convert, text, capsys, rate, harmful):
    words = ["--rank", "20", "--calibrate", text, *SMALL, "--recover", "6", "--recovery.learning_rate", rate]
    convert(*words)
    assert ("recovery did harm" in capsys.readouterr().out) == harmful


torch.set_num_threads(1)
OPTIONS = RecoveryOptions(learning_rate=3e-3)


@pytest.fixture
def pair(monkeypatch):
    """(student, dense, windows): a small Llama and what is left of it in half the cache, for small updates."""
    monkeypatch.setattr(recovery, "WINDOWS_PER_STEP", 2)
    monkeypatch.setattr(recovery, "WARM_UP", 1)
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

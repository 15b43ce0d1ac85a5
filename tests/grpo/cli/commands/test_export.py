"""A run's policy in other tools: stock transformers, its MTP module, peft; a card that says what the run says; and what
the hub's API gets."""

import base64
import copy
import json
import shutil
import signal
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
import zoo
from huggingface_hub import constants
from local_server import serving
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.modeling_layers import MtpModel

from grpo.cli.commands.export import ExportError, _refuse_moved_parts, export, origin_of
from grpo.cli.commands.model_card import _for_other_programs
from grpo.cli.parse import main
from grpo.config.policy import ModelOptions
from grpo.source.policy_source import load_policy, save_policy
from grpo.train import train
from policies.conversion.dense import convert_checkpoint
from policies.files import hub
from policies.files.checksums import checksums
from policies.policy import Policy, PolicyError
from policies.presets import small_tokenizer
from review.readers.run_folder import read_metrics
from review.statistics.estimates import wilson_interval

TOKENS = torch.tensor([[5, 9, 2, 7, 7, 30, 11, 4]])
LORA = {"lora.rank": 2, "lora.targets": ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "experts", "router"]}
LICENCE = "Anybody may do anything with these weights.\n"


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def draft_logits(policy: Policy) -> torch.Tensor:
    """Depth 1 of our head, [1, T - 1, V]."""
    positions, causal = torch.arange(TOKENS.shape[1])[None], torch.zeros_like(TOKENS)
    with torch.no_grad():
        hidden = policy.hidden(TOKENS, positions, causal)[:, :-1]
        [out] = policy.unroll(hidden, TOKENS[:, 1:], positions[:, 1:], causal[:, 1:], 1)
        return out @ policy.lm_head.T


@pytest.fixture(scope="module")
def base(random_policy, tmp_path_factory) -> dict[bool, Path]:
    """Checkpoints with and without MTP head, with a licence, a model card, a chat template and two stop tokens."""
    folders = {}
    for mtp in (True, False):
        policy = random_policy(3, mtp=mtp, n_routed_experts=8, n_group=4, topk_group=2)
        policy.tokenizer = copy.deepcopy(policy.tokenizer)  # other tests share it
        policy.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
        policy.trunk.generation_config = GenerationConfig(eos_token_id=[0, 5], pad_token_id=1)
        folders[mtp] = tmp_path_factory.mktemp("base") / "checkpoint"
        policy.save(folders[mtp])
        (folders[mtp] / "LICENSE").write_text(LICENCE)
        (folders[mtp] / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# a base\n")
    return folders


@pytest.fixture(scope="module")
def runs(base, micro_config, tmp_path_factory) -> dict[tuple[str, bool], tuple[Path, Policy]]:
    """Run folders and the live policies that they ended with, by (full | lora, MTP)."""
    results = {}
    for kind, options in (("full", {}), ("lora", LORA)):
        for mtp in (True, False):
            folder, live = tmp_path_factory.mktemp(kind) / "run", []
            given = {"model": str(base[mtp]), "sft.steps": 0, "steps": 2, "eval.limit": 6, **options}
            given |= {"prompts_per_step": 2, "rollout.max_completion_tokens": 6}
            given |= {} if mtp else {"rollout.draft_tokens": 0}
            if kind == "lora" and mtp:  # adapters in the draft head and in what it shares with the trunk, too
                given["lora.targets"] = [*LORA["lora.targets"], "lm_head", "mtp"]
            with pytest.MonkeyPatch.context() as patch:
                save = Policy.save
                patch.setattr(
                    Policy, "save", lambda self, path, live=live, save=save: (live.append(self), save(self, path))
                )
                train(micro_config(folder, **given))
            results[kind, mtp] = folder, live[-1]
    return results


@pytest.fixture(
    params=[("full", True), ("full", False), ("lora", True), ("lora", False)], ids=lambda p: f"{p[0]}-{p[1]}"
)
def run(request, runs):
    return runs[request.param]


@pytest.fixture
def copied(runs, tmp_path) -> Callable[[str, bool], Path]:
    """`copied("full", True)`: a copy of this run's folder, which a test may change."""
    return lambda *kind: Path(shutil.copytree(runs[kind][0], tmp_path / "run"))


def card_of(folder: Path, exported: Path) -> str:
    export(folder, exported)
    return (exported / "README.md").read_text()


@pytest.mark.slow
def test_stock_transformers_loads_the_live_policy(run, base, tmp_path):
    folder, live = run
    said = export(folder, tmp_path / "exported")
    assert "apache-2.0, LICENSE" in said
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float32)
    assert type(stock).__module__.startswith("transformers.")
    torch.testing.assert_close(logits(stock), logits(live.trunk), rtol=0, atol=1e-5)
    start = Policy.load(base[live.mtp is not None])
    assert (logits(stock) - logits(start.trunk)).abs().max() > 1e-3  # it has learned something
    assert Policy.load(tmp_path / "exported").weights().keys() == start.weights().keys()


@pytest.mark.slow
def test_a_policy_saved_before_vllms_fields_were_written_is_exported_with_them(runs, copied, tmp_path):
    run = copied("full", True)
    (run / "policy/digests.json").unlink()  # it had none then
    file = run / "policy" / "config.json"
    now = json.loads(file.read_text())
    fields = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1}
    file.write_text(json.dumps({name: value for name, value in now.items() if name not in fields}))
    export(run, tmp_path / "exported")
    said = json.loads((tmp_path / "exported/config.json").read_text())
    assert {name: said[name] for name in fields} == fields
    assert said == now
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float32)
    assert torch.equal(logits(stock), logits(runs["full", True][1].trunk))


@pytest.mark.parametrize("adapter", [False, True])
def test_weights_that_were_saved_for_their_owner_alone_are_exported_for_all_who_may_read(copied, tmp_path, adapter):
    run = copied("lora", False)
    (run / "policy/model.safetensors").chmod(0o600)
    export(run, tmp_path / "exported", adapter=adapter)
    weights = [file.stat().st_mode & 0o777 for file in (tmp_path / "exported").glob("*.safetensors")]
    (tmp_path / "any").touch()
    assert weights == [(tmp_path / "any").stat().st_mode & 0o777] != [0o600]


def test_what_belongs_to_it_comes_along(run, tmp_path):
    folder, live = run
    export(folder, tmp_path / "exported")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported")
    text = "3 + 4 = 7\n"
    assert tokenizer(text).input_ids == live.tokenizer(text).input_ids
    assert tokenizer.chat_template == live.tokenizer.chat_template is not None
    assert GenerationConfig.from_pretrained(tmp_path / "exported").eos_token_id == [0, 5]
    assert (tmp_path / "exported/LICENSE").read_text() == LICENCE
    for name in ("config.yaml", "environment.json", "metrics.jsonl"):
        assert (tmp_path / "exported/run" / name).read_bytes() == (folder / name).read_bytes()
    assert "the end of the run (its weights are of step 2)" in (tmp_path / "exported/README.md").read_text()
    assert not (tmp_path / "exported/training.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["exported"]


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_transformers_own_mtp_module_drafts_what_we_draft(runs, tmp_path, kind):
    folder, live = runs[kind, True]
    export(folder, tmp_path / "exported")
    trunk = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float32)
    trunk._keys_to_ignore_on_load_unexpected = [r"model\.layers\.(2)\."]  # as the card says
    stock = MtpModel.from_pretrained(trunk).eval()
    positions = torch.arange(1, TOKENS.shape[1])[None]
    with torch.no_grad():
        hidden = trunk.model(TOKENS).last_hidden_state[:, :-1]
        expected = trunk.lm_head(stock.forward_layer(0, hidden, positions, None, input_ids=TOKENS[:, 1:]))
    torch.testing.assert_close(draft_logits(live), expected, rtol=0, atol=1e-4)
    greedy = {"max_new_tokens": 12, "do_sample": False}
    plain, drafted = trunk.generate(TOKENS, **greedy), trunk.generate(TOKENS, **greedy, use_mtp=True)
    assert torch.equal(plain, drafted)


@pytest.mark.parametrize("mtp", [True, False])
def test_peft_loads_the_adapters_on_the_base(runs, base, tmp_path, mtp):
    """Dense, shared and routed experts and the router: in peft's own reading of the targets some would be lost."""
    folder, live = runs["lora", mtp]
    said = export(folder, tmp_path / "adapter", adapter=True)
    for text in (said, (tmp_path / "adapter/README.md").read_text()):
        assert ("The draft head is not among them: export without `--adapter`" in text) == mtp
    assert not (tmp_path / "adapter/model.safetensors").exists()
    stock = AutoModelForCausalLM.from_pretrained(base[mtp], dtype=torch.float32)
    before = logits(stock)
    model = PeftModel.from_pretrained(stock, tmp_path / "adapter")
    torch.testing.assert_close(logits(model), logits(live.trunk), rtol=0, atol=1e-5)
    assert not torch.allclose(logits(model), before, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    assert AutoTokenizer.from_pretrained(tmp_path / "adapter").chat_template
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == str(
        base[mtp]
    )


def test_a_checkpoint_inside_a_run_is_exported_as_of_its_step(runs, tmp_path):
    folder, _ = runs["lora", True]
    step = folder / "checkpoints/step_000001"
    export(step, tmp_path / "exported")
    first, last = (
        AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32) for p in (tmp_path / "exported", folder / "policy")
    )
    assert not torch.equal(logits(first), logits(last))
    card = (tmp_path / "exported/README.md").read_text()
    assert "checkpoint step_000001" in card
    assert "1 steps; every step's numbers" in card  # nothing that was measured later
    assert "step 2" not in card
    export(step, tmp_path / "adapter", adapter=True)
    base = AutoModelForCausalLM.from_pretrained(origin_of(str(folder)).model, dtype=torch.float32)
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(base, tmp_path / "adapter")), logits(first), rtol=0, atol=1e-5
    )


def test_the_adapters_of_a_policy_are_those_of_its_step(runs, base, copied, tmp_path):
    """Of the best policy, or of a run that went on: not of the newest checkpoint."""
    folder = copied("lora", False)
    first = load_policy(ModelOptions(model=str(folder / "checkpoints/step_000001")))
    save_policy(first, folder / "best_policy", 1)
    export(folder / "best_policy", tmp_path / "adapter", adapter=True)
    stock = AutoModelForCausalLM.from_pretrained(base[False], dtype=torch.float32)
    found = logits(PeftModel.from_pretrained(stock, tmp_path / "adapter"))
    torch.testing.assert_close(found, logits(first.trunk), rtol=0, atol=1e-5)
    assert not torch.equal(logits(first.trunk), logits(runs["lora", False][1].trunk))
    shutil.rmtree(folder / "checkpoints/step_000001")
    with pytest.raises(
        ExportError, match="has no checkpoint of .*best_policy, where adapters are kept; drop --adapter"
    ):
        export(folder / "best_policy", tmp_path / "again", adapter=True)


def test_a_router_whose_bias_has_another_name_in_the_files_is_no_fault(tmp_path):
    zoo.tiny("exaone_moe").save_pretrained(tmp_path / "base")
    small_tokenizer(["one two"] * 20).save_pretrained(tmp_path / "base")
    _refuse_moved_parts(Policy.load(tmp_path / "base"), str(tmp_path / "base"))


def test_the_card_of_a_dense_model_in_mla_form_names_no_program_that_cannot_serve_it(tmp_path):
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    config = LlamaConfig(intermediate_size=48, vocab_size=320, max_position_embeddings=128, **sizes)
    Policy(LlamaForCausalLM(config).eval(), None, small_tokenizer(["two and three"] * 20)).save(tmp_path / "dense")
    convert_checkpoint(str(tmp_path / "dense"), tmp_path / "mla")
    Policy.load(tmp_path / "mla", add_mtp=True).save(tmp_path / "drafts")
    said = "\n".join(_for_other_programs(tmp_path / "drafts", "name"))
    assert "vllm serve" not in said
    assert "vLLM does not compute its rotary frequencies" in said
    assert "use_mtp=True" in said


def test_the_card_says_what_the_run_says(runs, base, tmp_path):
    folder, _ = runs["lora", True]
    card = card_of(folder, tmp_path / "exported")
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "tags": ["grpo", "quartet-rl"],
    }
    lines = read_metrics(folder)
    for when, line in (("before (step 0)", lines[0]), ("after (step 2)", lines[-1])):
        sampled, greedy = line["eval/reward_mean"], line["eval/reward_mean_greedy"]
        assert f"| {when} | 6 | {sampled:.3f} | {greedy:.3f} |" in body
    assert f"| `reward/mean` | {lines[1]['reward/mean']:.4g} | {lines[2]['reward/mean']:.4g} |" in body
    here = json.loads((folder / "environment.json").read_text())
    assert here["command"] in body
    assert here["hardware"]["cpu"] in body
    assert f"torch {here['versions']['torch']}" in body
    effective = body.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(effective) == yaml.safe_load((folder / "config.yaml").read_text())
    assert f"started from `{base[True]}`" in body
    assert "Licence of the base: apache-2.0, LICENSE." in body
    assert r"model\.layers\.(2)\." in body
    served = """VLLM_MLA_DISABLE=1 vllm serve "exported" --compilation-config '{"custom_ops": ["-rotary_embedding"]}'"""
    assert served in body


def test_the_card_links_the_report_of_the_run_and_names_every_resume_with_its_machine(copied, tmp_path):
    folder = copied("full", True)
    assert "`quartet report run` writes its curves" in card_of(folder, tmp_path / "without")
    (folder / "report.html").write_text("<html>a report")
    here = json.loads((folder / "environment.json").read_text())
    here["hardware"]["cpu"] = "Another CPU"
    event = {"time": "2026-12-01T00:00:00", "event": "resume", "step": 1, "environment": here}
    with (folder / "events.jsonl").open("a") as events:
        events.write(json.dumps(event) + "\n")
    card = card_of(folder, tmp_path / "with")
    assert "[The report of the run](run/report.html)" in card
    assert (tmp_path / "with/run/report.html").read_text() == "<html>a report"
    assert "resumed at step 1, 2026-12-01T00:00:00: Another CPU" in card


def test_the_card_claims_nothing_that_the_run_did_not_record(copied, tmp_path):
    """Completions without a mark are left out of the accuracy, so its denominator is not the number of problems."""
    folder = copied("full", False)
    lines = read_metrics(folder)

    def card(number: int, rows: list[dict]) -> str:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return card_of(folder, tmp_path / str(number))

    lines[0]["eval/accuracy"], lines[-1]["eval/accuracy"] = 2 / 5, 3 / 6
    said, (low, high) = card(0, lines), wilson_interval(3, 6)
    assert "| before (step 0) | 6 | 0.400 | - |" in said  # 2 of 5 is no share of 6 problems
    assert f"| after (step 2) | 6 | 0.500 | {low:.3f}-{high:.3f} |" in said
    assert "| after (step 2) | 6 | 0.500 | - |" in card(1, [*lines[:-1], lines[-1] | {"eval/unscored": 3}])
    trained = [{k: v for k, v in line.items() if not k.startswith("eval/")} for line in lines if "reward/mean" in line]
    said = card(2, trained)
    assert "The run evaluated no held-out problems." in said
    assert "| before" not in said
    assert "use_mtp" not in said
    assert "The run recorded no training step." in card(3, [])


def test_the_origin_is_found_through_runs_that_continue_runs(runs, base, copied, tmp_path):
    second = copied("full", True)
    first = {"model": str(runs["full", True][0] / "policy")}
    config = yaml.safe_load((second / "config.yaml").read_text()) | first
    (second / "config.yaml").write_text(yaml.safe_dump(config))
    origin = origin_of(str(second / "checkpoints/step_000001"))
    assert origin.model == str(base[True])
    assert origin.terms == {"license": "apache-2.0"}
    (tmp_path / "bare").mkdir()
    assert "ask its author" in origin_of(str(tmp_path / "bare")).licence_note
    assert "from scratch" in origin_of("tiny").licence_note


def test_an_existing_destination_is_left_alone(runs, tmp_path, capsys):
    (tmp_path / "there").write_text("mine")
    assert main(["export", str(runs["full", True][0]), str(tmp_path / "there")]) == 1
    assert "exists; remove it or name another" in capsys.readouterr().err
    assert (tmp_path / "there").read_text() == "mine"


def test_what_is_no_run_or_has_no_adapter_is_refused_and_nothing_is_left(runs, base, tmp_path):
    with pytest.raises(ExportError, match="is no run folder"):
        export(base[True], tmp_path / "out")
    with pytest.raises(ExportError, match=r"trained every weight \(lora: null\).* drop --adapter"):
        export(runs["full", True][0], tmp_path / "out", adapter=True)
    empty = tmp_path / "run"
    empty.mkdir()
    for name in ("config.yaml", "environment.json"):
        shutil.copy(runs["full", True][0] / name, empty / name)
    with pytest.raises(PolicyError, match="has not saved a policy yet.*--resume auto"):
        export(empty, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_damaged_policy_is_not_passed_on(copied, tmp_path):
    folder = copied("full", True)
    file = folder / "policy/model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(PolicyError, match="model.safetensors .* is damaged"):
        export(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_failure_or_a_signal_half_way_leaves_nothing(runs, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise OSError("disk full")

    run = runs["full", True][0]
    monkeypatch.setattr("grpo.cli.commands.export.model_card", fail)
    with pytest.raises(OSError, match="disk full"):
        export(run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        monkeypatch.setattr(
            "grpo.cli.commands.export.model_card", lambda *_, number=number: signal.raise_signal(number)
        )
        before = signal.getsignal(number)
        assert main(["export", str(run), str(tmp_path / "out")]) == 128 + number
        said = "interrupted" if number == signal.SIGINT else f"ended by {number.name}"
        assert capsys.readouterr().err == f"quartet: {said}\n"
        assert signal.getsignal(number) == before
        assert list(tmp_path.iterdir()) == []


def test_adapters_whose_base_has_changed_are_refused(copied, random_policy, tmp_path):
    folder = copied("lora", True)
    other = random_policy(8, n_routed_experts=8, n_group=4, topk_group=2)
    other.save(tmp_path / "other")
    config = yaml.safe_load((folder / "config.yaml").read_text()) | {"model": str(tmp_path / "other")}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(PolicyError, match="other': the base weights are not those that the adapters of step 2"):
        export(folder, tmp_path / "out", adapter=True)
    # A checkpoint of an older version names no base: the sum of base and adapters tells.
    saved = folder / "checkpoints/step_000002"
    document = json.loads((saved / "state.json").read_text())
    del document["state"]["base"]
    (saved / "state.json").write_text(json.dumps(document))
    (saved / "manifest.json").unlink()
    (saved / "manifest.json").write_text(checksums(saved))
    with pytest.raises(ExportError, match="do not add up to .*export without --adapter"):
        export(folder, tmp_path / "out", adapter=True)


def test_an_expert_bias_that_moved_is_not_lost_in_an_adapter(base, micro_config, tmp_path):
    given = {"model": str(base[True]), "sft.steps": 0, "steps": 1, "balance.bias_rate": 0.1, **LORA}
    train(micro_config(tmp_path / "run", **given))
    with pytest.raises(ExportError, match=r"moved .*e_score_correction_bias \(balance.bias_rate\).* drop --adapter"):
        export(tmp_path / "run", tmp_path / "out", adapter=True)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0


REPO = "someone/words"


class _Hub(BaseHTTPRequestHandler):
    """Answers as the recorded API of the hub does, with every file in the commit itself."""

    def _answer(self):
        length = int(self.headers.get("Content-Length") or 0)
        body, path = self.rfile.read(length), self.path.partition("?")[0]
        hub_, status, said = self.server, 200, {}
        hub_.seen.append((self.command, path, self.headers.get("Authorization"), body))
        if self.headers.get("Authorization") != "Bearer hf_good" and self.command != "HEAD":
            status, said = 401, {"error": "Invalid username or password."}
        elif path == "/api/whoami-v2":
            said = {"type": "user", "name": "someone", "auth": {"type": "access_token"}}
        elif path in hub_.refuses:
            status, said = 403, {"error": "You have read access only"}
        elif path == "/api/repos/create":
            said = {"url": f"{hub_.url}/{REPO}", "name": REPO, "id": "1"}
        elif path.endswith("/preupload/main"):
            as_usual = {"uploadMode": "regular", "shouldIgnore": False}
            said = {"files": [{"path": f["path"]} | as_usual for f in json.loads(body)["files"]]}
        elif path.endswith("/commit/main"):
            said = {"success": True, "commitOid": "c" * 40, "commitUrl": f"{hub_.url}/{REPO}/commit/{'c' * 40}"}
        elif path.startswith("/api/models/"):
            said = {"id": REPO, "sha": "a" * 40, "siblings": []}
        text = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    do_GET = do_POST = do_HEAD = do_PUT = _answer

    def log_message(self, *_):
        pass


@pytest.fixture
def the_hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.seen, server.refuses, server.url = [], set(), f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    hub.unreachable.cache_clear()
    with serving(server):
        yield server
    hub.unreachable.cache_clear()


@pytest.fixture
def pushed(runs) -> str:
    return str(runs["full", False][0])


def committed(server) -> dict[str, bytes]:
    [body] = [body for _, path, _, body in server.seen if path == f"/api/models/{REPO}/commit/main"]
    lines = [json.loads(line) for line in body.splitlines()]
    return {
        line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
    }


def test_an_export_is_pushed_whole_with_its_card(the_hub, pushed, tmp_path, capsys):
    assert main(["export", pushed, str(tmp_path / "out"), "--push_to_hub", REPO]) == 0
    sent = committed(the_hub)
    assert sent == {
        str(f.relative_to(tmp_path / "out")): f.read_bytes() for f in (tmp_path / "out").rglob("*") if f.is_file()
    }
    assert {"config.json", "README.md", "run/config.yaml", "model.safetensors"} <= set(sent)
    assert f'from_pretrained("{REPO}")' in sent["README.md"].decode()
    [made] = [json.loads(body) for _, path, _, body in the_hub.seen if path == "/api/repos/create"]
    assert (made["name"], made["organization"], made["visibility"]) == ("words", "someone", "private")
    assert f"pushed to {the_hub.url}/{REPO}" in capsys.readouterr().out


def test_without_a_folder_nothing_is_left(the_hub, pushed, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    assert main(["export", pushed, "--push_to_hub", REPO]) == 0
    assert "README.md" in committed(the_hub)
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_none_is_refused(the_hub, pushed, capsys):
    for arguments, message in (
        (["--push_to_hub", "words"], "'words' has no owner: write OWNER/NAME"),
        (["--push_to_hub", "a/b/c"], "'a/b/c' is no name of a repository"),
        ([], "name the folder to write, DST, or a repository: --push_to_hub OWNER/NAME"),
    ):
        assert main(["export", pushed, *arguments]) == 1
        assert message in capsys.readouterr().err
    assert the_hub.seen == []


def test_nothing_is_written_without_a_network_or_a_token(the_hub, pushed, tmp_path, monkeypatch, capsys):
    command = ["export", pushed, str(tmp_path / "out"), "--push_to_hub", REPO]
    monkeypatch.setenv("HF_TOKEN", "hf_bad")
    assert main(command) == 1
    assert "the hub does not know who you are" in capsys.readouterr().err
    hub.unreachable.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(command) == 1
    assert "HF_HUB_OFFLINE is set, so nothing is fetched. Leave it out" in capsys.readouterr().err
    hub.unreachable.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert main(command) == 1
    assert "http://127.0.0.1:9 cannot be reached" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_refusal_of_the_hub_is_told_and_the_folder_kept(the_hub, pushed, tmp_path, capsys):
    the_hub.refuses.add("/api/repos/create")
    the_hub.refuses.add(f"/api/models/{REPO}/preupload/main")
    assert main(["export", pushed, str(tmp_path / "out"), "--push_to_hub", REPO]) == 1
    said = capsys.readouterr().err
    assert "the hub refused it: " in said
    assert "403" in said
    assert said.rstrip().endswith(f"the export is in {tmp_path / 'out'}")
    assert (tmp_path / "out/README.md").is_file()

"""`quartet mtp` on micro policies: a corpus on disk, epochs as long as they gain, a trunk that does not move, a stopped
run that goes on to the same bits."""

import json
import math
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from grpo.cli.mtp import mtp, rows_of, split, stores_head
from grpo.cli.parse import main
from grpo.config.mtp import HeadOptions, MtpConfig, defaults_of_run
from grpo.config.run import SftConfig
from grpo.learner.batch import collate, micro_batches
from grpo.learner.head_learner import HeadLearner, noise_keys
from grpo.learner.lessons import KINDS, TOKENS, Corpus
from grpo.learner.prepare import recorded, supervised
from grpo.learner.row import PackedRow, Sample
from grpo.learner.terms.draft_head import DraftHeadTerm
from grpo.learner.update import NonFiniteStep, Update
from grpo.run import checkpoint
from grpo.run.log import RunLog
from grpo.run.stop import Stopped
from grpo.sft import sft
from grpo.source.policy_source import find_policy, load_found
from grpo.task.task import Task
from policies.conversion.head import start_head
from policies.policy import Policy
from review.readers.run_folder import read_metrics
from rewards.config.options import load
from rollout.decoding.engine import Engine
from rollout.faults import RolloutError
from rollout.group import Completion, Prompt, RolloutGroup
from rollout.pool import PoolOptions
from rollout.sampling import FULL_ROW, SamplingParams, row_key
from rollout.workers.local_pool import LocalPool

STEPS, EPOCHS = 3, 4


@pytest.fixture(scope="module")
def taught(micro_preset, tmp_path_factory) -> Path:
    """A micro policy after a little supervision, without a draft head."""
    folder = tmp_path_factory.mktemp("sft") / "run"
    given = {"model": micro_preset, "output_dir": folder, "threads": 1, "log.trackers": [], "mtp.loss_weight": 0.0}
    given |= {"data.task_options.levels": [1], "data.limit": 16, "rollout.max_completion_tokens": 10}
    sft(load(SftConfig, None, given | {"steps": 60, "prompts_per_step": 8, "learner.learning_rate": 1e-2}))
    policy = Policy.load(folder / "policy")
    policy.mtp = None
    policy.save(folder.parent / "headless")
    return folder.parent / "headless"


@pytest.fixture(scope="module")
def config(taught, letters):
    def build(folder: Path, **given) -> MtpConfig:
        options = {
            "model": str(taught),
            "output_dir": folder,
            "threads": 1,
            "steps": STEPS,
            "prompts_per_step": 4,
            **({} if "data.name" in given else {"data.task_options.levels": [1]}),
            "data.limit": 10,
            "rollout.group_size": 4,
            "rollout.max_completion_tokens": 16,
            "rollout.draft_tokens": 3,
            "rewards": [{"function": letters}],
            "mtp.depth": 3,
            "mtp.epochs": EPOCHS,
            "mtp.solutions": 2,
            "mtp.tokens_per_update": 128,
            "mtp.learning_rate": 5e-3,
            "mtp.draft_vocabulary": 64,
            "eval.limit": 0,
            "checkpoint.keep": None,
            "log.trackers": [],
        }
        return load(MtpConfig, None, options | given)

    return build


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    mtp(config(folder, **{"checkpoint.every": 1}))
    return folder


def _tensors(folder: Path, step: int) -> dict[str, torch.Tensor]:
    saved = checkpoint.load(folder / f"checkpoints/step_{step:06d}")
    return {f"{file}/{name}": t for file, mapping in saved.tensors.items() for name, t in mapping.items()}


# A publication that is cut short or fails has no canaries in the line of its step.
UNCOMPARED = ("time/", "speed/", "memory/", "run/", "sync_check/")


def _untimed(folder: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if not k.startswith(UNCOMPARED)} for line in read_metrics(folder)]


@pytest.mark.long
def test_the_head_learns_to_draft_and_the_trunk_keeps_its_bits(config, taught, tmp_path):
    given = {"steps": 4, "mtp.epochs": 8, "eval.limit": 12, "mtp.draft_vocabulary": None, "prompts_per_step": 8}
    given["mtp.restart"] = False
    results = mtp(config(tmp_path / "run", **given))
    # What an epoch's held-out rollouts promise is what drafts then are.
    before, *lines, after = read_metrics(tmp_path / "run")
    promised = [line["draft/held_out_tokens_per_forward"] for line in lines if "curriculum/draft_depth" in line]
    assert max(promised) > promised[0] + 0.3
    # On held-out problems, which a policy that knows 16 by heart continues as it likes, the head gains less.
    assert after["eval/tokens_per_forward"] > before["eval/tokens_per_forward"] + 0.2
    shares = [after[f"eval/acceptance_depth_{d}"] for d in (1, 2, 3)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > before["eval/acceptance_depth_1"] + 0.15
    assert after["eval/tokens_per_forward"] == pytest.approx(1 + sum(shares), abs=0.2)
    # Drafts change no token: the completions, and with them the scores, are those of before.
    for way in ("sampled", "greedy"):
        first, last = (results.evaluations[f"{when}, {way}"] for when in ("before", "after"))
        assert [g.texts for g in first.groups] == [g.texts for g in last.groups]
    former, policy = Policy.load(taught), Policy.load(tmp_path / "run/policy")
    assert policy.mtp is not None
    for name, tensor in former.trunk.state_dict().items():
        assert torch.equal(policy.trunk.state_dict()[name], tensor), name


@pytest.mark.slow
def test_a_new_head_starts_as_the_trunks_last_layer_and_a_stored_one_only_where_asked(config, taught, tmp_path):
    def first_acceptance(name: str, **given) -> float:
        mtp(config(tmp_path / name, **{"steps": 1, "eval.limit": 12, "mtp.learning_rate": 1e-6} | given))
        return read_metrics(tmp_path / name)[0]["eval/acceptance_depth_1"]

    started = first_acceptance("started")
    random = first_acceptance("random", **{"mtp.restart": False})
    assert started > random + 0.1
    stored = {"model": str(tmp_path / "random/policy")}
    assert first_acceptance("kept", **stored) < started - 0.1
    assert first_acceptance("again", **stored | {"mtp.restart": True}) > random + 0.1


@pytest.mark.slow
def test_rollouts_come_first_and_epochs_over_them_last(whole):
    lines = read_metrics(whole)
    assert [line["step"] for line in lines] == list(range(1, STEPS + EPOCHS + 1))
    sampled, epochs = lines[:STEPS], lines[STEPS:]
    losses = "loss/mtp", "loss/mtp_tv"
    assert all("completion/tokens" in line and not any(loss in line for loss in losses) for line in sampled)
    assert all("completion/tokens" not in line and sum(line.get(loss, 0) for loss in losses) > 0 for line in epochs)
    assert [line["curriculum/draft_depth"] for line in epochs] == [1, 2, 3, 3]
    for line in epochs:
        shares = [line[f"draft/held_out_acceptance_depth_{d}"] for d in (1, 2, 3)]
        assert 1 >= shares[0] >= shares[1] >= shares[2] >= 0
        assert line["draft/held_out_tokens_per_forward"] == pytest.approx(1 + sum(shares))
    assert not any(name.startswith(("reward/", "group/")) for line in lines for name in line)


def test_the_corpus_is_on_disk_and_held_out_prompts_are_not_in_what_is_taught(whole, config):
    tokenizer = Policy.load(whole / "policy").tokenizer
    with Task.of(config(whole)) as task:
        prompts = {
            kind: {tuple(task.prompt(example, tokenizer).token_ids) for example in examples}
            for kind, examples in zip(KINDS, split(task, config(whole).seed), strict=True)
        }
    assert not prompts["taught"] & prompts["held_out"]
    corpus = Corpus(whole / "corpus")
    for kind in KINDS:
        lessons = corpus.lessons(kind, STEPS, torch.device("cpu"))
        counted = sum(line.get(TOKENS[kind], 0) for line in read_metrics(whole))
        assert sum(lesson.tokens for lesson in lessons) == counted > 0
        for lesson in lessons:
            assert lesson.preceding.shape[:2] == lesson.token_ids.shape
            assert (lesson.noise_keys is not None) == (kind == "held_out")
            for ids, length in zip(lesson.token_ids, lesson.prompt_lengths, strict=True):
                assert tuple(ids[:length].tolist()) in prompts[kind]
    assert sorted(path.name for path in (whole / "corpus").iterdir()) == [f"step_{i:06d}" for i in range(1, STEPS + 1)]


def test_each_sampled_token_has_the_key_of_its_own_noise():
    """The second completion is the first one again and stands once, so the third comes earlier than by its length."""
    completions = [[3, 4], [3, 4], [5, 6, 7]]
    group = RolloutGroup(Prompt("p", "", [8, 9]), [Completion(ids, [0.0] * 3, "", "stop", 0) for ids in completions])
    row = PackedRow([8, 9], [Sample(i, ids, [0.0] * len(ids)) for i, ids in enumerate(completions)])
    params = SamplingParams(group_size=3)
    keys = noise_keys(collate([row], "cpu"), [group], params)
    third = list(row_key(params, "p", 2))
    assert keys[0, :2].tolist() == [[0, 0]] * 2
    assert keys[0, 2].tolist() in [list(row_key(params, "p", i)) for i in (0, 1)]
    assert keys[0, 4:].tolist() == [third] * 3


def test_problems_that_are_the_same_are_held_out_together(config, tmp_path):
    """An eighth of the problems, of every kind: which ones depends on content and seed."""
    rows = [{"question": f"What is {i % 16} + 1?", "answer": f"#### {i % 16 + 1}"} for i in range(48)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = {"data.name": str(tmp_path / "train.jsonl"), "data.limit": None}
    with Task.of(config(tmp_path / "run", **given)) as task:
        taught, held_out = split(task, 0)
        assert (len(taught), len(held_out)) == (42, 6)
        assert not {e.question for e in taught} & {e.question for e in held_out}
        assert {e.question for e in split(task, 1)[1]} != {e.question for e in held_out}


def test_the_policy_of_a_run_drafts_from_its_trimmed_vocabulary(whole, config):
    policy = Policy.load(whole / "policy")
    assert policy.draft_ids.shape == (64,)
    assert set(policy.stop_token_ids) <= set(policy.draft_ids.tolist())
    assert all(0.8 < line["draft/vocabulary_coverage"] <= 1 for line in read_metrics(whole)[STEPS:])


def test_null_drafts_from_the_whole_vocabulary_again(whole, config, tmp_path):
    mtp(config(tmp_path / "run", model=str(whole), steps=1, **{"mtp.draft_vocabulary": None, "mtp.epochs": 1}))
    assert Policy.load(tmp_path / "run/policy").draft_ids is None


@pytest.mark.slow
@pytest.mark.parametrize("k", [pytest.param(1, marks=pytest.mark.long), STEPS + 2])
def test_contract_9_a_stopped_run_resumes_to_the_same_bits(whole, config, tmp_path, k):
    folder = tmp_path / "run"
    with pytest.raises(Stopped, match=f'stopped after step {k}; go on with resume="auto"'):
        mtp(config(folder, **{"checkpoint.every": 1}), stop_after=k)
    assert not (folder / "policy").exists()
    mtp(config(folder, **{"checkpoint.every": 1}), resume="auto")
    assert _untimed(folder) == _untimed(whole)
    for step in range(1, STEPS + EPOCHS + 1):
        first, second = _tensors(folder, step), _tensors(whole, step)
        assert first.keys() == second.keys()
        assert [name for name in first if not torch.equal(first[name], second[name])] == []
    names = set(_tensors(whole, 1))
    assert {name for name in names if name.startswith("policy/trunk.")} <= {
        name for name in names if name.endswith("e_score_correction_bias")
    }
    assert "draft/ids" not in names
    assert "draft/ids" in _tensors(whole, STEPS + 1)  # the first epoch counts what was said
    policies = [Policy.load(run / "policy").weights() for run in (folder, whole)]
    assert all(torch.equal(tensor, policies[1][name]) for name, tensor in policies[0].items())


def _signal(kind: signal.Signals):
    return lambda: signal.raise_signal(kind)


def _fail(error: BaseException):
    def fail() -> None:
        raise error

    return fail


DIED = RolloutError("workers died 4 times")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "name", "call", "what", "error", "saved"),
    [  # the end of the corpus is saved, and every epoch
        (LocalPool, "sample", 3, _fail(Stopped()), 'stopped after step 2; go on with resume="auto"', [2]),
        (LocalPool, "sample", 3, _fail(DIED), "workers died 4 times", [2]),
        # one before, one at the end
        pytest.param(
            *(LocalPool, "sync_weights", 2, _fail(DIED), "workers died 4 times", [3, 4, 5, 6, 7]),
            marks=pytest.mark.long,
        ),
        (Corpus, "add", 2, _fail(OSError("No space left on device")), "No space left on device", [1]),
        # in the middle of an epoch
        (Update, "make", 5, _fail(NonFiniteStep("the gradient is nan")), "the gradient is nan", [3]),
        pytest.param(
            *(HeadLearner, "teach", 3, _fail(NonFiniteStep("the loss is nan")), "the loss is nan", [3, 4, 5]),
            marks=pytest.mark.long,
        ),
        pytest.param(RunLog, "step", 3, _fail(KeyError("a bug")), "a bug", [3], marks=pytest.mark.long),
        # a signal while the head is taught finishes the step
        (HeadLearner, "teach", 2, _signal(signal.SIGINT), f"stopped after step {STEPS + 2}; go on", [3, 4, 5]),
        pytest.param(
            *(HeadLearner, "teach", 2, _signal(signal.SIGTERM), f"stopped after step {STEPS + 2}; go on", [3, 4, 5]),
            marks=pytest.mark.long,
        ),
    ],
)
def test_contract_9_a_failure_or_a_signal_saves_the_last_whole_step(
    whole, config, tmp_path, monkeypatch, owner, name, call, what, error, saved
):
    folder, real, calls = tmp_path / "run", getattr(owner, name), []

    def interrupted(*arguments, **named):
        calls.append(1)
        if len(calls) == call:
            if name == "step":
                real(*arguments, **named)
            what()
        return real(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        with pytest.raises((Exception, Stopped), match=error):
            mtp(config(folder))
    assert list(checkpoint.saved(folder / "checkpoints")) == saved
    mtp(config(folder), resume="auto")
    assert _untimed(folder) == _untimed(whole)


def test_a_resume_with_another_configuration_is_refused(whole, config):
    for given in ({"mtp.learning_rate": 0.5}, {"steps": STEPS + 1}):
        with pytest.raises(ValueError, match=next(iter(given)).replace(".", r"\.")):
            mtp(config(whole, **given), resume="auto")


def test_a_checkpoint_of_an_unfinished_run_can_be_evaluated_and_exported(whole, config, tmp_path):
    source = find_policy(str(whole / f"checkpoints/step_{STEPS + EPOCHS:06d}"))
    loaded, ended = load_found(source, config(tmp_path)).weights(), Policy.load(whole / "policy").weights()
    assert loaded.keys() == ended.keys()
    assert [name for name in loaded if not torch.equal(loaded[name], ended[name])] == []
    assert main(["export", str(whole), str(tmp_path / "exported")]) == 0
    assert torch.equal(Policy.load(tmp_path / "exported").draft_ids, ended["draft_ids"])
    assert "from teaching the draft head" in (tmp_path / "exported/README.md").read_text()


@pytest.mark.parametrize("vocabulary", [pytest.param(None, marks=pytest.mark.slow), 2 * FULL_ROW])
def test_contract_3_a_trimmed_vocabulary_changes_no_token(random_policy, vocabulary):
    """Also behind publications of another vocabulary, and of none."""
    policy = random_policy(3, **({} if vocabulary is None else {"vocab_size": vocabulary}))
    size = policy.config.vocab_size
    prompts = [Prompt(str(i), "", list(range(3 + i, 9 + 2 * i))) for i in range(4)]
    params = SamplingParams(4, 0.8, 30, stop_token_ids=(0,), seed=1, draft_tokens=0)
    plain = _tokens(Engine(policy).sample(prompts, params))
    source = Policy.from_skeleton(policy.skeleton())
    source.load_weights(policy.weights())
    source.mtp = random_policy(3, **({} if vocabulary is None else {"vocab_size": vocabulary})).mtp
    engine = Engine(policy)
    for version, every in enumerate((3, 7, None)):
        source.draft_ids = None if every is None else torch.arange(0, size, every)
        engine.sync_weights(source.weights(), version)
        assert (engine.draft_vocabulary is None) == (every is None)
        groups = engine.sample(prompts, replace(params, draft_tokens=3))
        assert _tokens(groups) == plain
        drafted = {
            token
            for group in groups
            for c in group.completions
            for token, depth in zip(c.token_ids, c.draft.depths, strict=True)
            if depth
        }
        assert every is None or all(token % every == 0 for token in drafted)


def _tokens(groups: list[RolloutGroup]) -> list[list[int]]:
    return [c.token_ids for group in groups for c in group.completions]


def _learner(policy: Policy, temperature: float = 0.9, **given) -> HeadLearner:
    return HeadLearner(policy, HeadOptions(**given), temperature=temperature, seed=0)


def _rows(seed: int = 0, count: int = 3) -> list[PackedRow]:
    generator = torch.Generator().manual_seed(seed)

    def tokens(length: int) -> list[int]:
        return torch.randint(2, 250, (length,), generator=generator).tolist()

    return [PackedRow(tokens(5 + i), [Sample(j, tokens(6)) for j in range(3)]) for i in range(count)]


def test_depths_grow_by_one_in_each_epoch_and_total_variation_begins_after_one_that_gains_nothing(random_policy):
    for depth, expected in ((3, [1, 2, 3, 3, 3]), (1, [1] * 5)):
        learner = _learner(random_policy(0), depth=depth)
        assert [learner.depth_at(epoch) for epoch in range(1, 6)] == expected
    assert [setattr(learner, "stage", stage) or learner.tv for stage in range(3)] == [False, True, True]


@pytest.mark.parametrize("vocabulary", [None, 2 * FULL_ROW])
@pytest.mark.parametrize("trims", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_what_recorded_rollouts_would_accept_is_what_decoding_accepted(random_policy, vocabulary, trims, temperature):
    policy = random_policy(3, **({} if vocabulary is None else {"vocab_size": vocabulary}))
    windows = [torch.randint(2, 250, (60,), generator=torch.Generator().manual_seed(i)) for i in range(30)]
    policy.mtp.load_state_dict(start_head(policy.trunk, windows).state_dict())
    policy.draft_ids = torch.arange(0, policy.config.vocab_size, 2) if trims else None
    params = SamplingParams(4, temperature, 30, stop_token_ids=(0,), seed=5, draft_tokens=3).at(7)
    prompts = [Prompt(str(i), "", list(range(3 + i, 9 + 2 * i))) for i in range(4)]
    groups = Engine(policy).sample(prompts, params)
    learner = _learner(policy, temperature, depth=3)
    chains = taken = 0
    for number, group in enumerate(groups):
        samples = [Sample(i, c.token_ids) for i, c in enumerate(group.completions)]
        [lesson] = learner.read([PackedRow(group.prompt.token_ids, samples, group=number)], groups, params)
        masks, start = [right[0] for _, right in learner.drafts(lesson)], len(group.prompt.token_ids)
        for completion in group.completions:
            depths, at = completion.draft.depths, 0  # of each token: 0 where the trunk gave it
            while at + 3 < len(depths):
                accepted = next((d for d in range(3) if depths[at + 1 + d] == 0), 3)
                assert [bool(mask[start + at]) for mask in masks] == [d < accepted for d in range(3)]
                at, chains, taken = at + 1 + accepted, chains + 1, taken + accepted
            start += len(depths)
    assert chains > 50
    assert taken > 5


@pytest.mark.parametrize("grows", [False, True])
def test_an_epoch_that_gains_nothing_is_undone_and_the_third_is_the_last(random_policy, monkeypatch, grows):
    learner = _learner(random_policy(4), depth=2 if grows else 1, learning_rate=1e-2)
    lessons = learner.read(_rows())
    found = iter([[0.2, 0.1], [0.3, 0.1], [0.3, 0.104], [0.5, 0.3], [0.1, 0.1], [0.5, 0.3]])
    monkeypatch.setattr(learner, "acceptance", lambda held_out: next(found))
    rates, kept = [], []
    for epoch in range(1, 6):
        before = learner.state()[0]["policy"]["mtp.eh_proj.weight"].clone()
        rates.append(learner.teach(lessons, lessons, epoch, epoch)["learner/learning_rate"])
        kept.append(not torch.equal(before, learner.state()[0]["policy"]["mtp.eh_proj.weight"]))
    # Gains of .1 and .004 (too little, but the depth may have grown), then .296, then none, twice.
    assert kept == [True, grows, True, False, False]
    assert learner.best == pytest.approx(1.8)
    assert learner.ended == (not grows)
    full = [1e-2 * len(lessons) / 20, 1e-2, 1e-2, 1e-2, 2.5e-3]
    assert rates == pytest.approx(full if grows else [*full[:2], 2.5e-3, 2.5e-3, 6.25e-4])


def test_a_first_epoch_that_is_undone_leaves_no_moments(random_policy, monkeypatch):
    learner = _learner(random_policy(4), depth=1)
    lessons, before = learner.read(_rows()), learner._copy()
    monkeypatch.setattr(learner, "acceptance", lambda held_out: [0.2, 0.1])
    learner.teach(lessons, lessons, 1, 1)
    after = learner.state()[0]
    assert {file: tensors.keys() for file, tensors in after.items()} == {f: t.keys() for f, t in before.items()}
    assert all(torch.equal(tensor, before[f][name]) for f, tensors in after.items() for name, tensor in tensors.items())


def test_a_run_ends_where_three_epochs_have_gained_nothing(config, tmp_path, monkeypatch):
    """And it goes on from there as one that has ended."""
    monkeypatch.setattr(HeadLearner, "acceptance", lambda learner, held_out: [0.5, 0.2, 0.1])
    folder, given = tmp_path / "run", {"steps": 1, "mtp.epochs": 9, "mtp.depth": 1}
    mtp(config(folder, **given))
    lines = read_metrics(folder)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert "time/sync" in lines[-1]
    saved = [_tensors(folder, step)["policy/mtp.eh_proj.weight"] for step in (1, 4)]
    assert torch.equal(*saved)
    mtp(config(folder, **given), resume="auto")
    assert read_metrics(folder) == lines


def test_frequent_tokens_are_those_that_the_policy_expects_to_say(random_policy):
    policy = random_policy(2)
    learner = _learner(policy, temperature=0.3)
    rows = _rows()
    mass, untempered = torch.zeros(2, policy.config.vocab_size)
    for row in rows:  # the trunk alone, completion by completion
        for sample in row.samples:
            logits = policy.trunk(torch.tensor([row.prompt_token_ids + sample.token_ids])).logits[0]
            at = len(row.prompt_token_ids) - 1
            mass += (logits[at:-1].float() / 0.3).softmax(-1).sum(0).detach()
            untempered += logits[at:-1].float().softmax(-1).sum(0).detach()
    assert {*mass.topk(19).indices.tolist()} != {*untempered.topk(19).indices.tolist()}
    stop = int(mass.argmin())
    policy.trunk.generation_config.eos_token_id = stop
    ids = learner.frequent_tokens(learner.read(rows), 20).tolist()
    assert ids == sorted({*mass.topk(19).indices.tolist(), stop})
    assert learner.frequent_tokens(learner.read(rows), policy.config.vocab_size) is None


@pytest.mark.parametrize("trims", [False, True])
def test_grpo_and_this_command_teach_the_head_the_same_loss(random_policy, trims):
    """The same rows through a learner's draft head term and through a lesson: the same gradient."""
    gradients = []
    for kind in ("lesson", "learner"):
        policy, rows = random_policy(5), _rows()
        policy.draft_ids = torch.arange(0, policy.config.vocab_size, 3) if trims else None
        learner = _learner(policy, depth=3)
        lessons = learner.read(rows)
        tokens = sum(row.num_completion_tokens for row in rows)
        for lesson, mini in zip(lessons, micro_batches(rows, 10_000, learner.policy.device), strict=True):
            if kind == "lesson":
                loss = learner.term.lesson(lesson, learner._work(recorded(lessons, 0, 3), learner.terms))
            else:
                work, [head] = learner._work(supervised(rows), learner.terms), learner.terms
                work.fixed["draft_head"] = {row.group: 1 / tokens for row in rows}
                loss = head.scalar(mini, learner.likelihood.forward(mini), work)
            loss.backward()
        gradients.append({name: p.grad for name, p in policy.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(name.startswith("mtp.") for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6)


def test_an_epoch_reads_the_disk_and_not_the_trunk(random_policy, monkeypatch, tmp_path):
    policy, reads = random_policy(6), []
    hidden = Policy.hidden
    monkeypatch.setattr(Policy, "hidden", lambda self, *a: reads.append(1) or hidden(self, *a))
    learner = _learner(policy, tokens_per_update=40, depth=1)
    gains = iter(range(99))  # every epoch gains, so that none of them goes on to total variation
    monkeypatch.setattr(learner, "acceptance", lambda held_out: [0.1 * next(gains)])
    lessons, corpus = learner.read(_rows()), Corpus(tmp_path / "corpus")
    corpus.add(1, {"taught": lessons[:2], "held_out": []})
    corpus.add(2, {"taught": lessons[2:], "held_out": []})
    stored = corpus.lessons("taught", 2, policy.device)
    for one, other in zip(stored, lessons, strict=True):
        assert vars(one).keys() == vars(other).keys()
        assert all(value is None or torch.equal(value, vars(other)[name]) for name, value in vars(one).items())
    assert len(stored) == len(reads) == 3
    losses = [learner.teach(stored, [], epoch, epoch)["loss/mtp"] for epoch in range(1, 9)]
    assert len(reads) == 3
    assert losses[-1] < losses[0]
    assert learner.teach(stored, [], 9, 9)["learner/updates"] == 3
    assert learner.policy_version == 9


def test_bfloat16_heads_have_masters(random_policy, monkeypatch):
    policy = random_policy(6).to(torch.bfloat16)
    learner = _learner(policy, learning_rate=1e-6)
    monkeypatch.setattr(learner, "acceptance", lambda held_out: [0.0])
    lessons = learner.read(_rows())
    before = {name: tensor.clone() for name, tensor in learner.state()[0]["policy"].items()}
    learner.teach(lessons, [], 1, 1)
    after = learner.state()[0]["policy"]
    moved = [name for name in after if not torch.equal(before[name], after[name])]
    assert any(name.endswith("eh_proj.weight") for name in moved)  # by less than bfloat16 can tell
    assert after["mtp.eh_proj.weight"].dtype == torch.float32
    assert math.isfinite(learner.teach(lessons, [], 2, 2)["loss/mtp"])


def test_groups_are_cut():
    groups = [
        RolloutGroup(Prompt("a", "", [1, 2, 3]), [Completion([4, 5], [], "", "stop", 0) for _ in range(3)]),
        RolloutGroup(Prompt("b", "", [1]), [Completion([7, 8], [], "", "stop", 0)]),
    ]
    rows = rows_of(groups, 7)
    shapes = [(row.prompt_token_ids, [sample.index for sample in row.samples], row.group) for row in rows]
    assert shapes == [([1, 2, 3], [0, 1], 0), ([1, 2, 3], [2], 0), ([1], [0], 1)]


@pytest.mark.slow
def test_the_command_takes_a_model_or_a_file(taught, letters, tmp_path, capsys):
    config = tmp_path / "head.yaml"
    config.write_text(f"model: {taught}\noutput_dir: {tmp_path / 'a'}\nsteps: 2\nrewards:\n- function: {letters}\n")
    words = ["--threads", "1", "--prompts_per_step", "2", "--data.task_options.levels", "[1]", "--data.limit", "8"]
    words += ["--rollout.max_completion_tokens", "6", "--rollout.draft_tokens", "1", "--log.trackers", "[]"]
    words += ["--mtp.depth", "2", "--mtp.epochs", "2", "--eval.limit", "2"]
    assert main(["mtp", str(config), *words, "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert "draft head: FLOPs per token and pass" in shown
    assert "memory: fits: about" in shown
    assert f"disk at {tmp_path}: fits: about" in shown
    assert not (tmp_path / "a").exists()
    assert main(["mtp", str(config), *words]) == 0
    assert "after, sampled" in capsys.readouterr().out
    assert main(["mtp", str(config), *words, "--dry_run"]) == 1
    assert "already holds a run" in capsys.readouterr().err
    # The run as MODEL brings its data and rewards along.
    assert main(["mtp", str(tmp_path / "a"), *words, "--output_dir", str(tmp_path / "b"), "--print-config"]) == 0
    shown = capsys.readouterr().out
    assert letters in shown
    assert main(["mtp", str(tmp_path / "a"), *words, "--output_dir", str(tmp_path / "b"), "--steps", "1"]) == 0
    assert json.loads((tmp_path / "b/metrics.jsonl").read_text().splitlines()[-1])["step"] == 3
    assert main(["eval", str(tmp_path / "b"), "--eval.limit", "2", "--rollout.draft_tokens", "2"]) == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompts_per_step": 1}, "prompts_per_step=1.*greater than or equal to 2"),
        ({"eval.every": 2}, "eval.every=2 .command line.: quartet mtp does not use it; leave it out"),
        ({"mtp.draft_vocabulary": 3}, "mtp.draft_vocabulary"),
        ({"prompts_per_step": 50}, "prompts_per_step=50, but there are 10 training examples"),
        ({"mtp.solutions": 9}, "mtp.solutions=9, but 8 training examples are learned from.*lower it"),
        ({"data.split": "held_out"}, "must not be trained on"),
    ],
)
def test_what_makes_no_sense_is_refused_before_the_model_loads(config, tmp_path, monkeypatch, given, message):
    monkeypatch.setattr("grpo.steps.opening.load_policy", lambda *a: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=message):
        mtp(config(tmp_path / "run", **given))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="teaches in one process"):
        mtp(config(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_model_of_another_type_is_refused_with_the_way_out(hf_policy, config, tmp_path):
    hf_policy("qwen3").save(tmp_path / "qwen")
    with pytest.raises(ValueError, match="'qwen3' .*: it has no MTP head .*quartet convert"):
        mtp(config(tmp_path / "run", model=str(tmp_path / "qwen")))


def test_a_checkpoint_folder_brings_nothing_along_and_the_head_of_a_checkpoint_is_not_begun_anew(whole, taught):
    """The model that its run began with has none."""
    assert defaults_of_run(taught) == {}
    assert not stores_head(str(taught))
    assert stores_head(str(whole / "checkpoints/step_000004"))


def test_prompts_that_leave_no_room_are_refused_before_anything_is_sampled(config, tmp_path, monkeypatch):
    monkeypatch.setattr("grpo.steps.weight_sync.open_run_pool", lambda *_, **__: pytest.fail("sampling was prepared"))
    with pytest.raises(ValueError, match=r"10 prompts, the first of them .* context of 256 with max_completion_tokens"):
        mtp(config(tmp_path / "run", **{"rollout.max_completion_tokens": 250}))


@pytest.mark.slow
def test_a_head_that_diverges_says_what_to_lower_and_goes_on_from_the_checkpoint(config, tmp_path, monkeypatch):
    given = {"steps": 2, "checkpoint.every": 1}
    loss = DraftHeadTerm.lesson

    def diverging(term, lesson, work):
        return loss(term, lesson, work) * (math.nan if work.batch.step == 4 else 1.0)

    with monkeypatch.context() as patch:
        patch.setattr(DraftHeadTerm, "lesson", diverging)
        with pytest.raises(NonFiniteStep, match=r'step 4: the loss is nan.*Lower mtp.learning_rate.*resume="auto"'):
            mtp(config(tmp_path / "run", **given))
    mtp(config(tmp_path / "run", **given | {"mtp.learning_rate": 1e-3}), resume="auto", force=True)
    assert (tmp_path / "run/policy").exists()


def test_of_several_mtp_layers_the_first_is_taught_and_the_others_stay(random_policy, config, tmp_path, caplog):
    random_policy(4).save(tmp_path / "deep")
    file = tmp_path / "deep/model.safetensors"
    tensors = load_file(file)
    first = {name: tensor for name, tensor in tensors.items() if name.startswith("model.layers.2.")}
    for layer in (3, 4):
        tensors |= {name.replace(".2.", f".{layer}.", 1): torch.randn_like(t) for name, t in first.items()}
    save_file(tensors, file, {"format": "pt"})
    shape = tmp_path / "deep/config.json"
    shape.write_text(json.dumps(json.loads(shape.read_text()) | {"num_nextn_predict_layers": 3}))
    mtp(config(tmp_path / "run", model=str(tmp_path / "deep"), steps=1, **{"mtp.epochs": 1}))
    assert "has 3 MTP layers: the first is trained and drafts at every depth" in caplog.text
    after = load_file(tmp_path / "run/policy/model.safetensors")
    assert after.keys() == tensors.keys()
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, tensors[name])}
    assert "model.layers.2.eh_proj.weight" in moved
    assert moved <= set(first)


def test_the_pool_of_a_trimmed_policy_starts_trimmed(random_policy):
    policy = random_policy(0)
    policy.draft_ids = torch.tensor([0, 4, 9])
    pool = LocalPool(policy, PoolOptions(prompts_per_shard=4))
    assert pool.engine.head.draft_ids.tolist() == [0, 4, 9]

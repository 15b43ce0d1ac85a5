"""`quartet diagnose`: every cause on a miniature run that has it, with numbers worked out by hand, and silence on runs
without one. A run has 4 steps with 4 groups of 4 completions, unless a test says otherwise, as a run writes them."""

import json
from pathlib import Path

import pytest
import yaml
import zstandard
from broken_runs import broken, healthy, make
from miniature_runs import MIXED, group, write

from grpo.cli.parse import main
from grpo.config.run import TrainConfig
from grpo.train import train
from review.findings.detectors import DETECTORS
from review.findings.report import diagnose
from review.readers.record import SHAPING, Record
from rewards.kinds import KINDS
from rewards.records import rollout_path
from rewards.registry import load_reward
from rewards.spec import RewardSpec

EVALUATED = [{"step": step, "eval/accuracy": p, "eval/prompts": 50} for step, p in ((0, 0.5), (6, 0.55))]

GAINED = [{"step": step, "eval/accuracy": p, "eval/prompts": 400} for step, p in ((0, 0.5), (6, 0.7))]
WARM = {"steps": 900, "learning_rate": 2e-3, "schedule": "constant"}
DECAYS = {"sft": WARM, "learner": {"schedule": "linear"}}


WRONG = group(0.0, 0.0, 0.0, 0.0)
RIGHT, SURE = [("#### 7", 1.0)] * 4, [("#### 3", 0.0)] * 4
ON = [("#### 1 ...", 1.0), ("#### 1\n#### 2 ...", 0.0), ("#### 3<|end|> it...", 0.0), ("#### 4\n#### 4...", 0.0)]
RISES = {"steps": ((MIXED,) * 4,) * 6, "metrics": {"reward/part/gsm8k": [0.30, 0.32, 0.4, 0.4, 0.50, 0.52]}}
PARTS = group(*({"gsm8k": 0.0, "form": mark} for mark in (0.0, 1.0, 0.0, 1.0)))
FORM_FIRST = group(*({"form": 1.0, "gsm8k": mark} for mark in (0.0, 1.0, 0.0, 1.0)))
GSM8K, FORM = {"function": "gsm8k"}, {"function": "mine.py:form"}


CASES = {
    "failed": (
        {"events": [{"event": "end", "how": "failed", "after_step": 3, "error": "OSError: disk"}]},
        "after step 3: OSError: disk.",
    ),
    "unmarked": ({"metrics": {"reward/abstained": [0.0, 0.0, 0.2, 0.4]}}, "15% of the completions have no score"),
    "stop-token": ({"steps": ((ON,) * 4,) * 4}, "100% of the completions were cut, and 75% go on"),
    "temperature": (
        {"steps": ((SURE,) * 4,) * 4, "options": {"rollout": {"temperature": 1e-6}}},
        "In 100% of the groups",
    ),
    "rate-high": (  # 2 nats a token · 20 tokens
        {"metrics": {"policy/approx_kl": [0.01, 0.01, 2.0, 0.01], "reward/part/gsm8k": [0.5, 0.5, 0.0, 0.0]}},
        "Step 3 moved the policy by a KL of 40 nats a completion, where one or two are many, and the scores went from "
        "0.5 to 0.",
    ),
    "sign-flipped": ({"metrics": {"alarm/correct/gsm8k": [-1.0, -0.5, -0.9, -0.7]}}, "r = -0.80."),
    "reward-constant": (
        {"steps": ((group(1.0, 1.0, 1.0, 1.0),) * 4,) * 4, "metrics": {"alarm/format/gsm8k": [0.3, 0.4, 0.2, 0.3]}},
        "All 64 completions got the score 1 of gsm8k, and 70% of them are correct",
    ),
    "template": (
        {"steps": ((group(0.0, 0.0, 0.0, 0.0, text="it is"),) * 3 + (MIXED,),) * 4},
        "In 75% of the groups most",
    ),
    "answer-column": (  # of the first half, one of eight sure groups is right
        {"steps": ((SURE,) * 4, (SURE, SURE, SURE, RIGHT), (MIXED,) * 4, (MIXED,) * 4)},
        "In 8 of 8 groups 75% or more of the completions give one and the same answer, and in 12% of them",
    ),
    "all-solved": (
        {"steps": ((RIGHT, RIGHT, RIGHT, group(1.0, 1.0, 1.0, 0.0)),) * 4},
        "75% of the groups get only full scores, and the run begins with 94% of the full score",
    ),
    "none-solved": ({"steps": ((WRONG,) * 4,) * 4}, "In 100% of the groups no completion scores more than 0."),
    "length-rewarded": (
        {
            "metrics": {
                "alarm/length/gsm8k": [0.9, 0.85, 0.95, 0.9],
                "alarm/correct/gsm8k": 0.1,
                "group/zero_variance": 0.95,
            }
        },
        "the reward score follows the length of completions (r = +0.90)",
    ),
    "small-groups": (
        {"options": {"rollout": {"group_size": 2}}, "metrics": {"group/zero_variance": 0.95}},
        "Groups have 2 completions, and 95% of them have zero variance.",
    ),
    "tied-groups": (
        {
            "metrics": {"group/zero_variance": 0.95},
            "events": [{"event": "nothing_learned", "why": "they are dull", "change": ["rollout.max_resamples: 2"]}],
        },
        "95% of the groups have zero variance and teach nothing: they are dull.",
    ),
    "rate-low": (  # √(1e-7 · 20 / 2) = .001 a step, and 8 steps are planned
        {"metrics": {"policy/approx_kl": 1e-7}, "options": {"steps": 8}},
        "all 8 steps together can change the share of correct answers by 0.8% at most",
    ),
    "other-part": (
        {"steps": ((PARTS,) * 4,) * 4, "options": {"rewards": [GSM8K, FORM]}},
        "the score goes with form (r = 1.00), and not with gsm8k (r = 0.00).",
    ),
    "noise": (
        {"steps": (([("#### 1", 0.0), ("#### 1", 1.0), *WRONG[2:]],) * 4,) * 4},
        "Of 16 texts that came twice or more for one prompt 16 got different scores, by 1 on average.",
    ),
    "tiny-differences": (  # .003 apart
        {"steps": ((group(0.8, 0.801, 0.802, 0.803),) * 4,) * 4},
        "In 100% of the groups whose scores differ they differ by less than a hundredth of 0.803.",
    ),
    "weights": ({"metrics": {"policy/ratio_mean": 1.5}}, "policy/ratio_mean is 0.5 away from 1."),
    "entropy": (
        {"steps": ((MIXED,) * 4,) * 2 + ((SURE,) * 4,) * 2, "metrics": {"policy/entropy": [0.8, 0.4, 0.1, 0.01]}},
        "In 100% of the later groups all completions are one text without the full score; the entropy went from "
        "0.8 to 0.01 nats a token.",
    ),
    "clipped": (
        {"metrics": {"completion/truncated": [0.0, 0.1, 0.4, 0.6]}},
        "50% of the later completions are truncated",
    ),
    # In training ± 12.706 √((.0002 + .0002) / 2). Wilson's intervals of .5 and .55 over 50 problems are .357 to .643
    # and .404 to .688, so that the difference is .05 - √(.146² + .143²) and .05 + √(.138² + .143²). A gain of .2
    # needs 2.8² (.5² + .7 · .3) / .2² = 90.2 problems.
    "evaluation": (
        RISES | {"evaluations": EVALUATED},
        "Training reward went from 0.310 to 0.510: +0.200 (95 % interval +0.020 to +0.380; 2 steps at either end), and "
        "held-out accuracy from 0.500 to 0.550: +0.050 (95 % interval -0.154 to +0.249; 50 problems). So few",
    ),
    "training-only": (
        RISES | {"evaluations": [row | {"eval/prompts": 400} for row in EVALUATED]},
        "held-out accuracy from 0.500 to 0.550: +0.050 (95 % interval -0.021 to +0.120; 400 problems). No gain on",
    ),
    "rate-decay": (
        RISES | {"evaluations": GAINED, "options": DECAYS},
        "held-out accuracy from 0.500 to 0.700: +0.200 (95 % interval +0.131 to +0.267; 400 problems). GRPO starts "
        "from an SFT stage of 900 steps at the constant rate 0.002, and learner.schedule=linear is the first decay",
    ),
}


CHANGES = {
    "temperature": "raise rollout.temperature (now 1e-06) to 1",
    "rate-high": "lower learner.learning_rate (now 0.0001), 10 times perhaps",  # √40 is nearer to 10 than to 1
    "rate-low": "raise learner.learning_rate (now 0.0001), 100 times perhaps",  # 1 / .008 = 125
    "tied-groups": "rollout.max_resamples: 2",
    "evaluation": "raise eval.limit to 91, or take 2 seeds",
    "rate-decay": "set sft.schedule: linear, and run again: a gain from there is not from the decay",
}


def test_every_detector_has_a_case():
    in_another_file = 11  # test_trl_faults.py
    assert len(DETECTORS) + 3 == len(CASES) + in_another_file  # and three of the gain


@pytest.mark.parametrize("kind", CASES)
def test_a_cause_is_found_with_its_number_and_nothing_before_it(tmp_path, kind):
    run, words = CASES[kind]
    findings = diagnose(Record(write(tmp_path, **run)))
    assert findings[0].kind == kind
    assert words in findings[0].evidence
    assert findings[0].change.startswith(CHANGES.get(kind, ""))


HEALTHY = {
    "much is solved, and a fifth is left": {"steps": ((RIGHT, RIGHT, RIGHT, MIXED),) * 4},
    "plain": {},
    "solved at its end": {"steps": ((MIXED,) * 4,) * 2 + ((RIGHT,) * 4,) * 2},
    "half of it solved": {"steps": ((RIGHT, RIGHT, MIXED, MIXED),) * 4},
    "sure and wrong now and then": {"steps": ((SURE, MIXED, MIXED, MIXED),) * 4},
    "form first": {
        "steps": ((FORM_FIRST,) * 4,) * 4,
        "options": {"rewards": [FORM, GSM8K]},
        "metrics": {"alarm/correct/score": 1.0},
    },
    "a great step that did good": {
        "steps": ((MIXED,) * 4,) * 6,
        "metrics": {"policy/approx_kl": 2.0, "reward/part/gsm8k": [0.1, 0.11, 0.3, 0.4, 0.50, 0.52]},
    },
    "marks of length and of being right": {"metrics": {"alarm/length/gsm8k": 0.85, "alarm/correct/gsm8k": 0.9}},
    "a gain on held-out problems too": RISES | {"evaluations": GAINED},
    "a gain after an SFT stage that decayed": RISES
    | {"evaluations": GAINED, "options": DECAYS | {"sft": WARM | {"schedule": "linear"}}},
    "a gain at a constant rate": RISES | {"evaluations": GAINED, "options": {"sft": WARM}},
    "a decay and no gain": {"options": DECAYS},
    "lengths that differ by chance": {"metrics": {"alarm/repetition/gsm8k": [1.0, -1.0, 0.6, 0.7]}},
    "the form is paid, and nothing is right yet": {
        "metrics": {"alarm/format/gsm8k": 1.0, "alarm/formed/gsm8k": 1.0, "reward/part/gsm8k": 0.25}
    },
    "groups of three that learn": RISES | {"evaluations": GAINED, "options": {"rollout": {"group_size": 3}}},
    "one reward of many that failed": {"steps": ((MIXED,) * 8,) * 4, "metrics": {"reward/errors": [1, 0, 0, 0]}},
    "a teacher is learned from": {
        "steps": ((WRONG,) * 4,) * 4,
        "metrics": {"group/zero_variance": 1.0, "reward/part/gsm8k": 0.0},
        "options": {"loss": {"advantage": "distill"}, "rollout": {"group_size": 2}},
    },
    "groups of one mark that the batch compares": {
        "steps": ((WRONG, [(f"#### {i}", 1.0) for i in range(4)]) * 2,) * 4,
        "metrics": {"group/zero_variance": 1.0},
        "options": {"loss": {"advantage": "reinforce_plus_plus"}},
    },
    "a penalty that never fires is the first reward": {
        "steps": ((group(*({"length_penalty": 0.0, "gsm8k": mark} for mark in (0.0, 1.0, 0.0, 1.0))),) * 4,) * 4,
        "options": {"rewards": [{"function": "length_penalty"}, GSM8K]},
    },
    "the first reward is only recorded": {
        "steps": ((FORM_FIRST,) * 4,) * 4,
        "options": {"rewards": [FORM | {"weight": 0.0}, GSM8K]},
    },
    "few steps of pairs": {
        "steps": (([("#### 1", 1.0), ("#### 2", 0.0)],) * 8,) * 4,
        "options": {"rollout": {"group_size": 2}},
        "metrics": {"group/zero_variance": 0.3, "reward/part/gsm8k": [0.3, 0.4, 0.5, 0.6]},
    },
    "few steps, and a great one that did good": {
        "metrics": {"policy/approx_kl": 2.0, "reward/part/gsm8k": [0.1, 0.3, 0.5, 0.7]}
    },
    "the sum of rewards stands still in training too": {
        "steps": ((MIXED,) * 4,) * 6,
        "metrics": RISES["metrics"] | {"reward/mean": [0.50, 0.52, 0.5, 0.5, 0.52, 0.50]},
        "evaluations": [{"step": step, "eval/reward_mean": 0.5, "eval/prompts": 400} for step in (0, 6)],
        "held_out": ("eval/reward_mean", [0.5, 0.6] * 10, [0.6, 0.5] * 10),
    },
    "few groups": {"steps": ((WRONG, WRONG),) * 3},
}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_gets_no_finding(tmp_path, name):
    run = dict(HEALTHY[name])
    metric, before, after = run.pop("held_out", ("", [], []))
    write(tmp_path, **run)
    if metric:
        problems(tmp_path, (0, before), (6, after), metric=metric)
    assert diagnose(Record(tmp_path)) == []


def test_the_rewards_that_only_shape_are_those_that_say_so():
    assert {load_reward(name).right_at for name in SHAPING} == {None}


@pytest.mark.parametrize("function", ["model:org/scorer", "model:folders/scorer", "chat:mine.py:scorer", "scorer"])
def test_the_marks_of_the_first_reward_are_read_by_its_label(tmp_path, function):
    parts = [{"scorer": 0.25 * sample, "form": 1.0} for sample in range(4)]
    options = {"rewards": [{"function": function}, FORM]}
    record = Record(write(tmp_path, steps=((group(*parts),) * 4,) * 4, options=options))
    assert record.first_reward == RewardSpec(function).label
    assert record.groups[0].marks == [0.0, 0.25, 0.5, 0.75]


def problems(folder, *evaluations, metric="eval/accuracy"):
    """held_out.jsonl, with a list of what each problem got for each step."""
    lines = [
        {"step": step, "metric": metric, "by_problem": {f"p{i}": value for i, value in enumerate(values)}}
        for step, values in evaluations
    ]
    (folder / "held_out.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_held_out_problems_are_compared_one_by_one_where_they_are_recorded(tmp_path):
    """Of 50 problems 2 were lost and 5 won. With two more on either side it is 3 / 54 ± 2.006 √(.2044 / 54)."""
    before = [1.0] * 25 + [0.0] * 25
    after = [0.0] * 2 + [1.0] * 28 + [0.0] * 20
    evaluations = [
        {"step": step, "eval/accuracy": sum(v) / 50, "eval/prompts": 50} for step, v in ((0, before), (6, after))
    ]
    run = write(tmp_path, **RISES, evaluations=evaluations)
    unpaired = Record(run).gains.held_out
    problems(run, (0, before), (6, [0.0] * 50), (6, after))  # the last record of a step counts
    paired = Record(run).gains.held_out
    assert (paired.low, paired.high) == pytest.approx((-0.0678, 0.1789), abs=1e-4)
    assert paired.high - paired.low < 0.7 * (unpaired.high - unpaired.low)
    assert paired.of == "the same 50 problems"
    [finding] = diagnose(Record(run))
    assert finding.kind == "training-only"  # 50 pairs would show a gain of .2
    assert "+0.060 (95 % interval -0.0" in finding.evidence


def test_a_reward_without_verdicts_is_compared_by_its_mean(tmp_path):
    before, after = [0.2, 0.4, 0.3] * 20, [0.1, 0.3, 0.2] * 20
    rows = [{"step": step, "eval/reward_mean": value, "eval/prompts": 60} for step, value in ((0, 0.3), (6, 0.2))]
    run = write(tmp_path, **RISES, evaluations=rows)
    assert diagnose(Record(run)) == []  # of means without their problems no interval is known
    problems(run, (0, before), (6, after), metric="eval/reward_mean")
    [finding] = diagnose(Record(run))
    assert finding.kind == "training-only"
    assert "the held-out reward from 0.300 to 0.200: -0.100" in finding.evidence
    assert finding.evidence.endswith("Held-out problems got worse.")


def test_a_policy_that_quartet_sft_trained_at_a_constant_rate(tmp_path):
    teacher = tmp_path / "sft"
    teacher.mkdir()
    learner = {"learning_rate": 2e-3, "schedule": "constant"}
    (teacher / "config.yaml").write_text(yaml.safe_dump({"model": "tiny", "steps": 9, "learner": learner}))
    options = {"model": str(teacher / "policy"), "learner": {"schedule": "cosine"}}
    [finding] = diagnose(Record(write(tmp_path / "run", **RISES, evaluations=GAINED, options=options)))
    assert finding.kind == "rate-decay"
    assert finding.change.startswith(f"train {teacher} again with quartet sft --learner.schedule linear")


def test_the_answer_of_an_episode_is_the_policys_last_turn(tmp_path):
    """A tool has the last word in the text; each of four policies answers something else."""
    run = write(tmp_path, steps=((WRONG,) * 4,) * 4)
    for step in range(1, 5):
        path = rollout_path(run, step)
        lines = [json.loads(line) for line in zstandard.decompress(path.read_bytes()).splitlines()]
        for line in lines:
            line["turns"] = [{"role": "assistant", "content": line["text"]}]
            line["text"] += " >> #### 42"
        path.write_bytes(zstandard.compress("".join(json.dumps(line) + "\n" for line in lines).encode()))
    assert [finding.kind for finding in diagnose(Record(run))] == ["none-solved"]
    assert {len(set(group.answers)) for group in Record(run).groups} == {4}


@pytest.mark.parametrize(("mark", "is_found"), [(0.5, True), (1.0, True), (0.0, False)])
def test_a_constant_reward_without_gold_answers(tmp_path, mark, is_found):
    """A 0 for all may be right; a 1 for four different answers is not, and .5 is no verdict."""
    findings = diagnose(Record(write(tmp_path, steps=((group(mark, mark, mark, mark),) * 4,) * 4)))
    assert (findings[0].kind == "reward-constant") == is_found
    assert not is_found or "of a group 25% give the same answer" in findings[0].evidence


def test_a_reward_under_another_name_is_read_as_what_it_is(tmp_path):
    steps = ((group(*[{"correct": 0.0}] * 4, text="it is"),) * 4,) * 4
    findings = diagnose(Record(write(tmp_path, steps, options={"rewards": [GSM8K | {"name": "correct"}]})))
    assert findings[0].kind == "template"


def test_the_template_of_the_run_that_taught_the_policy(tmp_path):
    teacher = write(tmp_path / "teacher", options={"data": {"template": "Q: {question}\nA:"}})
    findings = diagnose(Record(write(tmp_path / "run", options={"model": str(teacher / "policy")})))
    assert [finding.kind for finding in findings] == ["template"]
    assert "'{question}\\n'" in findings[0].evidence
    assert "begins with 25% of the full score" in findings[0].evidence
    assert findings[0].change == "set data.template to 'Q: {question}\\nA:'"


def test_the_command_prints_in_order_what_to_change_and_touches_nothing(tmp_path, capsys):
    run = write(tmp_path / "run", **CASES["small-groups"][0] | {"events": CASES["failed"][0]["events"]})
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(["diagnose", str(run), "--json", str(tmp_path / "out.json")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(run)
    assert lines[1:4] == [
        "state: step 4 of 4, failed",
        "score of the first reward: 0.5, at the end 0.5",
        "read: 16 groups of 4 steps, rollouts of 4",
    ]
    assert [lines[4][:24], lines[7][:24]] == ["1. error failed: The run", "2. warning small-groups:"]
    assert lines[9] == "   Change: raise rollout.group_size (now 2) to 8"
    assert lines[-2] == "1 error, 1 warning"
    assert [finding["kind"] for finding in json.loads((tmp_path / "out.json").read_text())["findings"]] == [
        "failed",
        "small-groups",
    ]
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_alarms_that_sounded_and_what_an_audit_finds_are_among_the_findings(tmp_path):
    """An alarm of an older run has the feature as its kind; of two alarms of one kind the first is told."""
    alarms = [{"event": "alarm", "step": 3, "kind": kind, "said": kind} for kind in ("length", "length-rewarded", "x")]
    run = write(tmp_path, events=alarms)
    assert [(finding.kind, finding.evidence) for finding in diagnose(Record(run))] == [
        ("length-rewarded", "length at step 3")
    ]
    for step in range(1, 5):
        path = rollout_path(run, step)
        lines = [json.loads(line) for line in zstandard.decompress(path.read_bytes()).splitlines()]
        for line in lines:
            line["advantage"] = 0.25 - line["reward"]
        path.write_bytes(zstandard.compress("".join(json.dumps(line) + "\n" for line in lines).encode()))
    findings = diagnose(Record(run))
    assert [finding.kind for finding in findings] == ["advantage-sign", "length-rewarded"]
    assert len(findings[0].where) == 64


def test_rollouts_of_another_trainer_are_audited_and_what_they_lack_is_said(tmp_path, capsys):
    rows = [{"input": f"{i}?", "output": f"{i}", "score": float(i % 2), "step": 1} for i in range(8)]
    (tmp_path / "1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for path in (tmp_path, tmp_path / "1.jsonl"):
        assert main(["diagnose", str(path), "--json", str(tmp_path / "out/found.json")]) == 0
        said = capsys.readouterr().out
        assert said.startswith("8 rollouts of the form verl")
        assert "not recorded: log-probabilities; not looked for: bad-logprobs, two-temperatures" in said
        assert "not recorded: options, metrics and events of a run; not looked for: failed, " in said
    lacking = json.loads((tmp_path / "out/found.json").read_text())["lacking"]
    assert "steps" not in lacking
    assert {kind for kinds in lacking.values() for kind in kinds} <= KINDS.keys()


def test_a_long_run_is_audited_in_a_part_of_its_steps(tmp_path, monkeypatch):
    monkeypatch.setattr("review.readers.record.AUDITED", 16)
    record = Record(write(tmp_path, steps=((MIXED,) * 2,) * 4))
    assert list(record.audited) == [1, 3]


def test_runs_of_which_something_is_missing(tmp_path, capsys):
    def said(code: int) -> str:
        assert main(["diagnose", str(tmp_path)]) == code
        return capsys.readouterr().out

    rollout_path(write(tmp_path, options={"steps": 60}), 2).write_bytes(b"no zstandard")
    out = said(0)
    for words in ("step 4 of 60, in progress or killed", "12 groups of 3 steps", "step_000002", "Nothing was found."):
        assert words in out
    assert "cannot be read: 1 records of rollouts" in out
    for path in (write(tmp_path, metrics={"group/zero_variance": 1.0}) / "rollouts").iterdir():
        path.unlink()
    out = said(1)
    assert "1. warning tied-groups: 100% of the groups" in out
    assert "There are no rollouts that can be read" in out
    write(tmp_path, steps=())
    assert "No step is recorded yet." in said(0)


def test_what_is_no_run_of_train_is_refused(tmp_path, capsys):
    run = write(tmp_path / "sft")
    (run / "held_out.jsonl").write_text('{"step": 0}\n')
    with pytest.raises(ValueError, match="held_out.jsonl"):
        Record(run)
    (run / "config.yaml").write_text("model: tiny\nsteps: 3\n")
    for folder, words in (
        (run, "is a run of quartet sft"),
        (tmp_path, "no metrics.jsonl"),
        (tmp_path / "x", "no such"),
    ):
        assert main(["diagnose", str(folder)]) == 1
        assert words in capsys.readouterr().err


def test_a_long_run_is_read_at_its_beginning_its_end_and_between(tmp_path):
    record = Record(write(tmp_path, steps=((MIXED,),) * 40))
    steps = [group.step for group in record.groups]
    assert len(steps) == 16
    assert steps[0] == 1
    assert steps[-1] == 40


DEMO = Path(__file__).parents[3] / "benchmarks/learn/words.yaml"
WARM_UP = {"steps": 1, "learner.learning_rate": 1e-12, "eval.limit": 0, "log.trackers": []}


@pytest.mark.slow
@pytest.mark.long  # three minutes of an SFT stage, and a third of a minute for each of fifteen runs
@pytest.mark.parametrize("unseen", [False, True], ids=["tuned", "unseen"])
def test_the_cause_comes_first_or_second_and_healthy_runs_get_none(tmp_path_factory, tmp_path, unseen):
    warm = tmp_path_factory.getbasetemp() / "warm"
    if not warm.exists():
        train(TrainConfig.read(DEMO, **WARM_UP, threads=1, output_dir=str(warm)))
    kinds = {}
    for seed, (name, overrides) in enumerate((broken(warm / "policy", tmp_path, unseen) | healthy(unseen)).items()):
        run = make(name, warm / "policy", tmp_path, overrides, seed + 1)
        kinds[name] = [finding.kind for finding in diagnose(Record(run))]
    causes = [name for name in kinds if not name.startswith("healthy")]
    assert len(causes) == 12
    assert sum(name in kinds[name][:2] for name in causes) >= 10, kinds
    assert [kinds[name] for name in healthy(unseen)] == [[], [], []]

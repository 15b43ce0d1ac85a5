"""`quartet reward test`: what it finds, what it says, and its exit codes."""

import doctest
import json
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from reward_workers import reward_workers

from grpo.cli.parse import main
from rewards import RewardError
from rewards.commands import probes as reward_probes
from rewards.commands.check import check_reward
from rewards.commands.options import RewardTestConfig
from rewards.commands.printer import show
from rewards.commands.probes import HOSTILE, KINDS, probes
from rewards.config.options import load
from rewards.console import Terminal
from rewards.data.examples import Example
from rewards.isolation import pool
from tests.cases.judges import judge_server, verdict

SLOW = pytest.mark.slow
EXAMPLE = Path(__file__).parents[3] / "examples/02_custom_reward.py"
SOURCE = """
import itertools, os, random, re, time
from rewards import per_completion

CALLS = itertools.count()

def _gold(answer):
    return answer.rpartition("####")[2].strip()

def contains(completions, answer, **_):
    return [float(_gold(gold) in text) for text, gold in zip(completions, answer)]

def last_line(completions, answer, **_):
    print("a user's print")
    return [1.0 * (t.strip().endswith(_gold(gold)) and t[:1].isalpha()) for t, gold in zip(completions, answer)]

def tenths(completions, answer, **_):
    return [sum([0.1] * 10) * (t.strip() == gold.strip()) for t, gold in zip(completions, answer)]

def fragile(completions, answer, **_):
    return [float(text.split()[-1] == _gold(gold)) for text, gold in zip(completions, answer)]

def hangs(completions, **_):
    for text in completions:
        if "I hope" in text:
            re.match(r"(a+)+$", "a" * 60 + "b")
    return [1.0] * len(completions)

def dies(completions, **_):
    os._exit(4)

def nan(completions, **_):
    return [float("nan")] * len(completions)

def wants_gold(completions, gold):
    return [1.0] * len(completions)

def wants_one(completion, answer):
    return 1.0

def random_bonus(completions, answer, **_):
    return [c + 1e-3 * random.random() for c in contains(completions, answer)]

def hashes(completions, **_):
    return [hash(text) % 97 / 97 for text in completions]

def ranks(completions, **_):
    return [float(i) for i in range(len(completions))]

def above_the_mean(completions, **_):
    mean = sum(map(len, completions)) / len(completions)
    return [len(text) - mean for text in completions]

def knows_its_neighbours(completions, answer, **_):
    others = set(answer)
    return [float(text != gold and text in others) for text, gold in zip(completions, answer)]

def rounds(completions, **_):
    return [1.0 + 1e-7 * (len(completions) > 1) for _ in completions]

def abstains(completions, **_):
    return [None] * len(completions)

def by_length(completions, **_):
    return [-len(text) / 100 for text in completions]

def slow(completions, **_):
    time.sleep(0.004 * len(completions))
    return [0.0] * len(completions)

@per_completion
async def everything(prompt, completion, answer, completion_ids, trainer_state, log_extra, log_metric, bonus=0.0):
    log_extra("ids", completion_ids)
    log_metric("step", trainer_state.global_step)
    assert completion_ids == list(completion.encode(errors="replace"))
    return bonus + float(completion.strip() == answer.strip())
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "mine.py"
    path.write_text(SOURCE)
    return path


def check(function: str, **options):
    levels = {} if "data.name" in options else {"data.task_options.levels": [1]}
    return check_reward(function, load(RewardTestConfig, None, levels | {"data.limit": 12} | options))


def faults(found) -> list[str]:
    return [finding.evidence for finding in found.faults]


def notes(found) -> list[str]:
    return [finding.evidence for finding in found.notes]


def cases(found):
    return [case for finding in found.findings for case in finding.where]


def kinds(found) -> dict[str, int]:
    return {kind.kind: kind.full for kind in found.kinds}


def test_the_example_of_the_issue_passes_and_gold_means_its_own_max_score():
    found = check(f"{EXAMPLE}:shows_its_work")
    assert found.max_score == 1.0
    assert faults(found) == []
    assert kinds(found) == dict.fromkeys(KINDS, 0) | {"gold": 12, "padded": 12}
    assert found.differing == {"scored again": 0, "in this process": 0, "among other completions": 0, "alone": 0}
    assert notes(found) == [
        "gold, closing sentence: 12 of 12 score not as it does",
        "gold, 42.0 for 42: 12 of 12 score not as it does",  # it compares texts
    ]
    assert {(s.kind, s.score, s.expected) for s in cases(found)} == {
        ("followed", 0.5, "as gold"),
        ("decimal", 0.5, "as gold"),
    }
    assert found.latency_ms["p50"] <= found.latency_ms["p95"] <= found.latency_ms["p99"] <= found.latency_ms["max"]
    assert found.completions_per_second > 0
    assert len(found.sha256) == 64
    higher = check(f"{EXAMPLE}:shows_its_work", max_score=2.0)
    assert faults(higher) == ["gold solution: 12 of 12 miss full marks"]


def test_marks_for_what_is_wrong_are_problems(file):
    found = check(f"{file}:contains")  # which looks for the answer anywhere
    assert kinds(found)["wrong"] == 12  # `6 + 6 = 12 ... #### 13` holds 12 as well
    assert "gold, last digit raised: 12 of 12 get full marks" in faults(found)
    assert "gold, then a wrong one: 12 of 12 get full marks" in notes(found)
    fault = next(case for finding in found.faults for case in finding.where if case.kind == "wrong")
    assert (fault.score, fault.expected) == (1.0, "below 1")
    assert fault.place.startswith("word_problems/1/")
    found = check(f"{file}:last_line")
    assert faults(found) == []
    assert "gold between blank lines: 12 of 12 score not as it does" in notes(found)
    wrong = check(f"{file}:last_line", arguments={"answer": ["none"] * 1000})  # the column of gold is wrong
    assert faults(wrong) == ["gold solution: 12 of 12 miss full marks"]
    assert faults(check("gsm8k_format")) == [
        "gold, last digit raised: 12 of 12 get full marks",
        "gold of another row: 12 of 12 get full marks",
    ]
    found = check("gsm8k_format", shaping=True)
    assert (faults(found), cases(found)) == ([], [])


def test_full_marks_that_are_missed_by_rounding_are_full_marks(file):
    assert sum([0.1] * 10) < 1.0
    found = check(f"{file}:tenths")
    assert kinds(found)["gold"] == 12
    assert faults(found) == []


def test_scores_that_differ_are_told_apart_by_what_they_differ_with(file, monkeypatch):
    monkeypatch.setattr(pool, "subprocess", subprocess)  # a fresh interpreter has a seed of hashes of its own
    random_ = check(f"{file}:random_bonus")
    assert all(count > 50 for count in random_.differing.values())
    assert any("score differently scored again: first on row 1 (word_problems/1/" in p for p in faults(random_))
    hashes = check(f"{file}:hashes", shaping=True)
    assert hashes.differing["scored again"] == hashes.differing["among other completions"] == 0
    assert hashes.differing["in this process"] > 50
    ranks = check(f"{file}:ranks", shaping=True)
    assert ranks.differing["scored again"] == ranks.differing["in this process"] == 0
    assert ranks.differing["among other completions"] > 50


def test_a_reward_that_depends_on_its_batch_is_found_out_in_a_few_rows(file):
    """Twelve rows are one batch, whose mean is the same in every order: only a completion that is alone tells."""
    found = check(f"{file}:above_the_mean", shaping=True)
    assert {name for name, count in found.differing.items() if count} == {"alone"}
    [problem] = faults(found)
    assert "completions score differently alone: first on row 1 (word_problems/1/" in problem
    assert problem.endswith(", then 0")
    rare = check(f"{file}:knows_its_neighbours", shaping=True)  # gold is as it is alone, other kinds are not
    assert rare.differing["alone"] > 0
    assert "gold of another row" in faults(rare)[-1]
    assert check(f"{file}:rounds", shaping=True).differing["alone"] == 0  # as a model that scores batches rounds


def test_correlation_with_length_by_hand(file, tmp_path):
    rows = [{"question": "?", "answer": "x" * n} for n in (1, 2, 3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = check(f"{file}:by_length", **{"data.name": str(tmp_path / "rows.jsonl")}, shaping=True)
    assert found.length_correlation["gold"] == pytest.approx(-1.0)
    assert any("longer completions score less: r = -1.00 with length (gold)" in note for note in notes(found))
    assert check("gsm8k").length_correlation["gold"] is None  # constant


def test_everything_that_a_function_may_ask_for_is_there(file, tmp_path):
    found = check(f"{file}:everything", arguments={"bonus": 0.5})
    assert found.max_score == 1.5
    assert faults(found) == []
    assert "completion_ids were made up: the bytes of the text, one token each" in notes(found)
    (tmp_path / "rows.jsonl").write_text('{"question": "?", "answer": "yes"}\n')
    found = check(f"{file}:everything", **{"data.name": str(tmp_path / "rows.jsonl")})
    assert any("no wrong completion could be made" in note for note in notes(found))


def test_abstentions_and_slowness_are_said(file):
    assert "154 completions got no score: the function abstained" in notes(check(f"{file}:abstains"))
    slow = check(f"{file}:slow", **{"data.limit": 2, "reward.timeout_s": 1.2}, shaping=True)
    assert any("a batch of 256 completions takes about" in note for note in notes(slow))


@pytest.mark.parametrize(
    ("function", "cause", "completion"),
    [
        ("fragile", "raised: IndexError: list index out of range (mine.py:", "(nothing): ''"),
        pytest.param("hangs", "timeout: no result after 0.8 s, stuck at mine.py:", "closing sentence", marks=SLOW),
        ("dies", "died: the process that ran it ended (exit code 4)", "(gold solution)"),
        ("nan", "nan: returned nan", "(gold solution)"),
    ],
)
def test_a_failure_names_function_row_and_cause(file, capsys, function, cause, completion):
    words = ["--data.limit", "6", "--data.task_options.levels", "[1]", "--reward.timeout_s", "0.8"]
    assert main(["reward", "test", f"{file}:{function}", *words]) == 1
    message = capsys.readouterr().err
    for part in (f"mine.py:{function}' fails on row 1 (word_problems/1/", cause, completion):
        assert part in message
    assert not reward_workers()


def test_the_row_of_a_failure_is_the_one_at_fault(tmp_path):
    rows = [{"question": f"q{n}", "answer": f"#### {n}"} for n in range(5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own.py").write_text(
        "def own(completions, answer):\n    return [1 / (a != '#### 3') for a in answer]\n"
    )
    with pytest.raises(RewardError, match=r"fails on row 4 \(.*/rows/3\): raised: ZeroDivisionError"):
        check(f"{tmp_path}/own.py:own", **{"data.name": str(tmp_path / "rows.jsonl")})


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["{file}:wants_gold"], 1, "wants_gold' asks for the column 'gold', which is not there. Columns: answer"),
        (["{file}:wants_one"], 1, "decorate it with @rewards.per_completion"),
        (["{file}:contain"], 1, "did you mean 'contains'?"),
        (["{file}x:contains"], 1, "is not an existing Python file"),
        (["gsm8"], 1, "did you mean 'gsm8k'?"),
        (["gsm8", "--data", "nobody/nothing"], 1, "did you mean 'gsm8k'?"),  # before any download
        (["gsm8k", "--data", "nowhere.jsonl"], 1, "there is no file or folder 'nowhere.jsonl'"),
        (["gsm8k", "--data", "gsm8"], 1, "did you mean 'gsm8k'?"),
        (["gsm8k", "--data", "{empty}"], 1, "has no rows"),
        (["gsm8k", "--data.solution_column", "solution", "--data", "{rows}"], 1, "has no column 'solution'"),
        (["gsm8k", "--limt", "3"], 2, "did you mean data.limit?"),
        (["gsm8k", "--data.limit", "0"], 2, "data.limit=0"),
        (["length_penalty", "--arguments.targt", "3"], 1, "no parameter 'targt' to bind (did you mean 'target'?)"),
    ],
)
def test_what_a_newcomer_gets_wrong_is_answered(file, tmp_path, capsys, words, code, message):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "rows.jsonl").write_text('{"question": "2 + 2 = ?", "answer": "#### 4"}\n')
    names = {"file": file, "empty": tmp_path / "empty.jsonl", "rows": tmp_path / "rows.jsonl"}
    assert main(["reward", "test", *(word.format(**names) for word in words)]) == code
    assert message in capsys.readouterr().err


def test_what_is_printed_and_written(file, tmp_path, capsys, caplog):
    out = tmp_path / "new" / "found.json"
    words = ["--data.limit", "5", "--data.task_options.levels", "[1]", "--json", str(out)]
    assert main(["reward", "test", f"{file}:contains", *words]) == 1
    shown = capsys.readouterr().out
    for part in (
        "on 5 rows of word_problems; full marks: 1",
        "At: word_problems/1/",
        "determinism",
        "p99",
        "2 errors, 2 notes",
    ):
        assert part in shown
    found = json.loads(out.read_text())
    assert found["rows"] == 5
    assert {"function", "sha256", "kinds", "differing", "latency_ms", "findings"} <= found.keys()
    assert caplog.text == ""
    assert main(["reward", "test", "gsm8k", "--data", "word_problems", "--data.limit", "5"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("Nothing was found.")
    assert (
        main(["reward", "test", f"{file}:ranks", "--json", str(out)]) == 1
    )  # full marks for texts that are no Unicode, too
    assert HOSTILE[-1] in {
        case["completion"] for finding in json.loads(out.read_text())["findings"] for case in finding["where"]
    }
    assert "\ud800" in HOSTILE[-1]


def test_it_loads_no_model_library():
    code = (
        "import sys; from grpo.cli.parse import main; "
        "assert main(['reward', 'test', 'gsm8k', '--data.limit', '2']) == 0; "
        "print(*{'transformers', 'ray', 'peft', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == ""


def test_real_gsm8k_with_each_way_of_reading_it(gsm8k_folder):
    for function in ("gsm8k", "gsm8k_flexible"):
        assert check(function, **{"data.name": str(gsm8k_folder), "data.limit": 25}).faults == []


def test_a_column_of_another_name_is_taken_by_a_function_of_two_lines(tmp_path, capsys):
    mine = tmp_path / "mine.py"
    mine.write_text(
        "def same(prompts, completions, reference, **_):\n"
        "    return [float(text == gold) for text, gold in zip(completions, reference)]\n\n\n"
        "def of_answer(prompts, completions, answer, **_):\n    return same(prompts, completions, answer)\n"
    )
    assert check(f"{mine}:of_answer").faults == []
    assert main(["reward", "test", f"{mine}:same", "--data.limit", "3"]) == 1
    assert "Wrap it in a function of two lines" in capsys.readouterr().err


LAST_NUMBER = """
import re

def last_number(completions, answer, **_):
    golds = [gold.rpartition("####")[2].replace(",", "") for gold in answer]
    found = [re.findall(r"-?[0-9.]*[0-9]", text.replace(",", ""))[-1:] for text in completions]
    return [float(bool(number) and float(number[0]) == float(gold)) for number, gold in zip(found, golds)]

def same_text(completions, answer, **_):
    texts = [text.replace("I hope this helps!", "").rpartition("####")[2].strip() for text in completions]
    return [float(text == gold.rpartition("####")[2].strip()) for text, gold in zip(texts, answer)]
"""


def test_a_grader_of_the_last_number_and_one_that_refuses_equal_forms_are_named(tmp_path):
    (tmp_path / "graders.py").write_text(LAST_NUMBER)
    rows = [{"question": f"What is {n} + 1?", "answer": f"{n} + 1 = {n + 1}\n#### {n + 1}"} for n in (41, 999, 12_344)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"data.name": str(tmp_path / "rows.jsonl")}
    found = check(f"{tmp_path}/graders.py:last_number", **data)
    assert "it is not the answer: 3 of 3 get full marks" in notes(found)
    assert {s.completion for s in cases(found) if s.kind == "denied"} >= {"It is not 42."}
    found = check(f"{tmp_path}/graders.py:same_text", **data)
    assert "gold, 42.0 for 42: 3 of 3 score not as it does" in notes(found)
    assert "gold, 1,000 for 1000: 2 of 2 score not as it does" in notes(found)
    assert not any("it is not the answer" in note for note in notes(found))
    good = check("gsm8k", **data)
    assert (faults(good), cases(good)) == ([], [])
    assert {kind: full for kind, full in kinds(good).items() if full} == {
        **{"gold": 3, "padded": 3, "followed": 3},
        **{"decimal": 3, "grouped": 2},
    }


def test_other_forms_are_made_of_an_answer_that_is_one_whole_number():
    golds = ["#### 1,234", "#### 0.5", "#### 3/4", "#### (1, 2)", "#### x^2", "-1000", "Room 7b", "It was in 1969"]
    rows = [dict(row) for row in probes([Example(str(i), "?", gold) for i, gold in enumerate(golds)])]
    forms = [[row.get(kind) for kind in ("decimal", "grouped", "denied")] for row in rows]
    assert forms[0] == ["#### 1,234.0", None, "It is not 1,234."]
    assert forms[5] == ["-1000.0", "-1,000", "It is not -1000."]
    assert forms[7] == ["It was in 1969.0", "It was in 1,969", "It is not 1969."]
    assert [forms[i] for i in (1, 2, 3, 4, 6)] == [[None, None, None]] * 5


def test_probes():
    assert doctest.testmod(reward_probes).failed == 0
    examples = [Example(str(i), f"q{i}", text) for i, text in enumerate(["yes", "#### 19", "no", "Yes "])]
    texts = [dict(row) for row in probes(examples)]
    assert "wrong" not in texts[0]  # no digit
    assert (texts[0]["other"], texts[0]["hedged"]) == ("#### 19", "yes\n#### 19")
    assert texts[1]["wrong"] == "#### 10"
    assert texts[3]["other"] == "#### 19"  # not "yes", which says the same
    assert [row["hostile"] for row in texts] == HOSTILE[:4]
    assert all(19_990 < len(text) <= 20_000 for text in HOSTILE)
    assert "other" not in dict(probes(examples[:1])[0])
    assert {kind for row in texts for kind in row} == set(KINDS) - {
        "grouped",
        "unanswered",
    }  # no thousands, no template


@pytest.mark.parametrize(
    "golds",
    [
        ["In 1969 men landed. They came home again. Answer: B", "In 1492 he sailed. He came home, too. Answer: B"],
        ["Water covers most of it. Answer: yes", "Ice is nothing but frozen water. Answer: yes"],
        ["6 * 7 = 42\n#### 42", "21 + 21 = 42.0\n#### 42.0"],
    ],
)
def test_an_answer_that_says_the_same_is_no_wrong_one(golds):
    rows = [dict(row) for row in probes([Example(str(i), "?", gold) for i, gold in enumerate(golds)])]
    assert not any("other" in row for row in rows)
    assert [row.get("wrong", "")[-4:] for row in rows] in (["", ""], ["# 43", "42.1"])


def test_a_judge_shows_its_cost_what_was_kept_and_what_failed():
    def answer(asked):  # right: the number of the last line; it breaks on empty texts
        gold, said = (part.rpartition("####")[2].strip() for part in asked.split("|"))
        return verdict("{" if not said else float(gold == said), tokens=7)

    with judge_server(answer) as server:
        arguments = {"url": server.url, "model": "m", "rubric": "{answer}|{completion}"}
        arguments |= {"retries": 1, "backoff_s": 0.001}
        found = check("judge", arguments=arguments, **{"data.limit": 3, "reward.on_error": "drop_sample"})
        shown = StringIO()
        show(found, Terminal(file=shown, width=200))
        with pytest.raises(RewardError, match=r"fails on row 1 .*the verdict is no JSON"):
            check("judge", arguments=arguments, **{"data.limit": 3})
    empty = 3 * 2 + 1  # nothing, only spaces, and one hostile text that ends with the marks
    assert len(found.failures) == empty
    assert faults(found)[0].startswith(f"{empty} completions failed; the first: reward 'judge' failed on prompt")
    asked = sum(kind.count for kind in found.kinds)
    kept = found.logged["judge_cached"]
    assert found.logged["judge_retries"] == empty
    assert found.logged["judge_tokens"] == 7 * (asked - kept + empty)
    assert f"judge_tokens {found.logged['judge_tokens']:g}" in shown.getvalue()
    assert f"error reward-fails: {empty} completions failed" in shown.getvalue()
    assert "abstained" not in shown.getvalue()


def test_a_completion_that_is_cut_before_its_answer_is_tried():
    golds = [
        "She has 3 + 4 = 7 eggs, and sells 5 of them.\n#### 2",
        "It is 12: 6 + 6.\n#### 12",
        "42",
        "#### 42",
    ]
    rows = [dict(row) for row in probes([Example(str(i), "?", gold) for i, gold in enumerate(golds)])]
    assert [row.get("cut") for row in rows] == ["She has 3 + 4 = 7 eggs,", None, None, "##"]


@pytest.fixture
def bare(tmp_path):
    file = tmp_path / "bare.jsonl"
    file.write_text("".join(f'{{"question": "{n} + 1 = ?", "answer": "{n + 1}"}}\n' for n in range(40)))
    (tmp_path / "tagged.py").write_text(
        "import re\n"
        "def exact(completions, answer, **_):\n"
        "    said = [re.search('<answer>(.*)</answer>', text) for text in completions]\n"
        "    return [float(bool(one) and one[1] == gold) for one, gold in zip(said, answer)]\n"
        "def formed(completions, answer, **_):\n"
        "    return [float('<answer>' in text) for text in completions]\n"
    )
    return tmp_path


def test_a_bare_answer_becomes_a_completion_by_a_template(bare):
    function = f"{bare / 'tagged.py'}:exact"
    data = {"data.name": str(bare / "bare.jsonl")}
    plain = check(function, **data)
    assert faults(plain) == ["gold solution: 12 of 12 miss full marks"]
    assert any("bare answers such as '1'" in note for note in notes(plain))
    filled = check(function, **data, template="So:\n<answer>{answer}</answer>")
    assert faults(filled) == []
    assert {kind: full for kind, full in kinds(filled).items() if full}.keys() == {
        "gold",
        "padded",
        "followed",
        "hedged",
    }
    formed = check(f"{bare / 'tagged.py'}:formed", **data, template="So:\n<answer>{answer}</answer>")
    assert "the template, no answer: 12 of 12 get full marks" in faults(formed)


def test_a_template_without_a_place_for_the_answer_is_refused(capsys):
    assert main(["reward", "test", "gsm8k", "--template", "<answer></answer>"]) == 2
    assert "template=<answer></answer> (command line): there is no {answer}" in capsys.readouterr().err

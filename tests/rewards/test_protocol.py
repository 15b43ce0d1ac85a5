"""What a reward is: signatures and their checks, per-completion functions, chat, where functions come from."""

import asyncio
import hashlib
import inspect

import pytest

from rewards import BUILT_IN, RewardError, Signature, load_reward, per_completion, text_of
from rewards.protocol import bind
from rewards.registry import find_reward


def grade(prompts, completions, answer, *, completion_ids, scale=1.0, **kwargs): ...


def test_signature():
    signature = Signature.of(grade)
    assert signature == Signature(("prompts", "completions", "answer", "completion_ids"), ("scale",), True)
    assert Signature.of(lambda completions, **_: None).takes_rest is False
    Signature.of(grade).check("grade", ["answer", "other"])
    Signature.of(grade).check("grade", [], {"answer": "42"})


def positional(prompts, completions, /): ...


COLUMN = "(?s)'my.py:grade' asks for the column 'answer'.*did you mean 'anwser'\\?.*Columns: anwser, question"


@pytest.mark.parametrize(
    ("function", "columns", "bound", "message"),
    [
        (grade, ["question", "anwser"], {}, COLUMN),
        (grade, ["question", "anwser"], {}, r"arguments: \{answer: ...\}"),
        (grade, ["answer"], {"scal": 2}, r"no parameter 'scal' to bind \(did you mean 'scale'\?\)"),
        (lambda completion: 1.0, [], {}, r"@rewards.per_completion"),
        (positional, [], {}, "positional-only"),
    ],
)
def test_what_a_signature_cannot_be_called_with_is_named(function, columns, bound, message):
    with pytest.raises((RewardError, TypeError), match=message):
        Signature.of(function).check("'my.py:grade'", columns, bound)


HUB = r"functions are not taken from the hub, .*a reward model is: function: model:(an-)?owner/"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("owner/name", HUB),
        ("owner/name:score", HUB),
        ("an-owner/a.name:score", HUB),
        ("gsm8", r"'gsm8' is not built in \(did you mean 'gsm8k'\?\).*path/to/file.py:fun"),
        ("rewards/nowhere.py:score", "nowhere.py is not an existing Python file"),
        ("/owner/name:score", "not an existing Python file"),
        ("a/b/c:score", "not an existing Python file"),
    ],
)
def test_a_name_that_leads_to_no_function_is_told_the_way(name, message):
    with pytest.raises(RewardError, match=message) as error:
        load_reward(name)
    assert ("hub" in str(error.value)) == (message == HUB)


def test_per_completion_passes_one_row():
    @per_completion
    def exact(prompt, completion, answer, completion_ids, trainer_state, log_extra, log_metric, scale=2.0, **rest):
        log_metric("calls", 1)
        if completion != "skip":
            log_extra("length", len(completion_ids))
        return None if completion == "skip" else scale * (completion == answer) + trainer_state + rest["bonus"]

    extras, metrics = {}, []
    rewards = exact(
        prompts=["a", "b", "c"],
        completions=["1", "2", "skip"],
        completion_ids=[[7], [7, 8], []],
        answer=["1", "3", "4"],
        bonus=[0.0, 0.5, 0.5],
        trainer_state=10,
        log_extra=extras.__setitem__,
        log_metric=lambda name, value: metrics.append((name, value)),
    )
    assert rewards == [12.0, 10.5, None]
    assert extras == {"length": [1, 2, None]}
    assert metrics == [("calls", 1)] * 3
    signature = Signature.of(exact)
    assert signature.required[:3] == ("prompts", "completions", "answer")
    assert signature.optional == ("scale",)
    assert signature.takes_rest


def test_per_completion_runs_async_functions_together():
    everyone_here = asyncio.Event()
    waiting = []

    @per_completion
    async def grade_together(completion):
        waiting.append(completion)
        if len(waiting) == 3:
            everyone_here.set()
        await asyncio.wait_for(everyone_here.wait(), timeout=5)
        return float(completion)

    assert inspect.iscoroutinefunction(grade_together)
    assert asyncio.run(grade_together(prompts=["p"] * 3, completions=["1", "2", "3"])) == [1.0, 2.0, 3.0]


def test_bound_arguments_are_not_split_over_rows():
    @per_completion
    def contains(completion, words):
        return float(all(word in completion for word in words))

    both = bind(contains, {"words": ["a", "b"]})
    assert both(prompts=["", ""], completions=["ab", "a"]) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("completion", "text"),
    [
        ("plain", "plain"),
        ([{"role": "assistant", "content": "chat"}], "chat"),
        ([{"role": "assistant", "content": "said"}, {"role": "tool", "name": "t", "content": "written"}], "said"),
        ([{"role": "user", "content": "asked"}, {"role": "assistant", "content": "answered"}], "answered"),
        ([{"role": "tool", "content": "4"}, {"role": "assistant", "content": "last"}], "last"),
        ([{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}], "ab"),
        ([{"role": "assistant", "content": None}], ""),
        ([], ""),
    ],
)
def test_text_of(completion, text):
    assert text_of(completion) == text


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_loads_and_takes_trl_keywords(name):
    parameters = inspect.signature(load_reward(name)).parameters
    assert {"prompts", "completions"} <= set(parameters)
    assert any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


@pytest.fixture
def reward_file(tmp_path):
    (tmp_path / "sibling_of_rewards.py").write_text("FULL = 1.0\n")
    file = tmp_path / "mine.py"
    file.write_text(
        "from sibling_of_rewards import FULL\n"
        "from json import dumps\n"
        "class Grader: ...\n"
        "def grade(completions, **_):\n    return [FULL] * len(completions)\n"
    )
    return file


def test_a_function_of_a_file(reward_file):
    reward = load_reward(f"{reward_file}:grade")
    assert reward(completions=["a", "b"]) == [1.0, 1.0]
    assert load_reward(f"{reward_file}:grade") is reward


def test_a_changed_file_is_another_module_and_a_source_once_read_stays(reward_file):
    source = find_reward(f"{reward_file}:grade")
    assert source.sha256 == hashlib.sha256(reward_file.read_bytes()).hexdigest()
    reward_file.write_text("def grade(completions, **_):\n    return [0.0] * len(completions)\n")
    assert load_reward(source)(completions=["a"]) == [1.0]
    assert load_reward(f"{reward_file}:grade")(completions=["a"]) == [0.0]


def test_a_missing_function_names_those_that_are_there(reward_file):
    with pytest.raises(RewardError, match=r"'grad' is not there \(did you mean 'grade'\?\).*defines: grade$"):
        load_reward(f"{reward_file}:grad")
    with pytest.raises(RewardError, match=r"'Grader' is no function \(did you mean 'grade'\?\)"):
        load_reward(f"{reward_file}:Grader")

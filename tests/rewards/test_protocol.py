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


def test_a_missing_column_is_named_with_those_that_are_there():
    with pytest.raises(RewardError) as caught:
        Signature.of(grade).check("'my.py:grade'", ["question", "anwser"])
    message = str(caught.value)
    assert "'my.py:grade' asks for the column 'answer'" in message
    assert "did you mean 'anwser'?" in message
    assert "Columns: anwser, question" in message
    assert "arguments: {answer: ...}" in message


def test_columns_bound_arguments_and_defaults_satisfy_a_signature():
    Signature.of(grade).check("grade", ["answer", "other"])
    Signature.of(grade).check("grade", [], {"answer": "42"})


def test_a_mistyped_argument_is_not_swallowed_by_kwargs():
    with pytest.raises(RewardError, match=r"no parameter 'scal' to bind \(did you mean 'scale'\?\)"):
        Signature.of(grade).check("grade", ["answer"], {"scal": 2})


def test_singular_parameters_point_to_the_decorator():
    with pytest.raises(RewardError, match=r"@rewards.per_completion"):
        Signature.of(lambda completion: 1.0).check("f", [])


def test_positional_only_parameters_are_refused():
    def reward(prompts, completions, /): ...

    with pytest.raises(TypeError, match="positional-only"):
        Signature.of(reward)


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


def test_an_unknown_built_in_names_the_nearest():
    with pytest.raises(RewardError, match=r"'gsm8' is not built in \(did you mean 'gsm8k'\?\).*path/to/file.py:fun"):
        load_reward("gsm8")


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


@pytest.mark.parametrize("name", ["owner/name", "owner/name:score", "an-owner/a.name:score"])
def test_a_reward_by_hub_id_is_refused_with_the_way_to_a_reward_model(name):
    with pytest.raises(
        RewardError, match=r"functions are not taken from the hub, .*a reward model is: function: model:(an-)?owner/"
    ):
        load_reward(name)


@pytest.mark.parametrize("name", ["gsm8", "rewards/nowhere.py:score", "/owner/name:score", "a/b/c:score"])
def test_what_is_no_hub_id_is_not_called_one(name):
    with pytest.raises(RewardError) as error:
        load_reward(name)
    assert "hub" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RewardError, match=r"nowhere.py is not an existing Python file"):
        load_reward(f"{tmp_path}/nowhere.py:grade")

"""Prompts as texts and tokens; the order of one source and of several: exact on resume, close to the weights."""

import json
import random
import re
from fractions import Fraction

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from grpo.data.mix import MixedStream, next_source
from grpo.data.prompts import PromptStream, PromptTemplate, encode_prompt
from rewards.data.examples import Example
from rollout.group import Prompt

SHOT = Example("shot", "1 + 1 = ?", "1 + 1 = 2\n#### 2", {"question": "1 + 1 = ?", "answer": "#### 2", "level": 1})
EXAMPLE = Example("sum/0", "2 + 3 = ?", "2 + 3 = 5\n#### 5", {"question": "2 + 3 = ?", "answer": "#### 5", "level": 2})
CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@pytest.fixture
def tokenizer():
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False)
    bpe.train_from_iterator(["2 + 3 = ?\n"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", chat_template=CHAT)


def add_special_tokens(tokenizer, pattern):
    specials = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=pattern, special_tokens=specials)


def test_a_format_string_over_the_columns(tokenizer):
    prompt = encode_prompt(EXAMPLE, tokenizer, PromptTemplate("Level {level}: {question} {{think}}\n"))
    assert prompt.text == "Level 2: 2 + 3 = ? {think}\n"
    assert prompt == Prompt("sum/0", prompt.text, prompt.token_ids, EXAMPLE.columns)
    assert tokenizer.decode(prompt.token_ids) == prompt.text


def test_few_shot_examples_come_first_with_their_solutions_and_the_question_is_the_prompt_column():
    template = PromptTemplate("Q: {question}\nA: ", few_shot=[SHOT])
    assert template.render(EXAMPLE) == "Q: 1 + 1 = ?\nA: 1 + 1 = 2\n#### 2\n\nQ: 2 + 3 = ?\nA: "
    example = Example("0", "the problem", "", {"question": "another column", "problem": "the problem"})
    assert PromptTemplate("{question}").render(example) == "the problem"


def test_the_chat_template(tokenizer):
    prompt = encode_prompt(EXAMPLE, tokenizer, PromptTemplate({"system": "Add."}, few_shot=[SHOT]))
    assert prompt.text == (
        "<s>system\nAdd.</s>\n<s>user\n1 + 1 = ?</s>\n<s>assistant\n1 + 1 = 2\n#### 2</s>\n"
        "<s>user\n2 + 3 = ?</s>\n<s>assistant\n"
    )
    assert prompt.token_ids.count(tokenizer.bos_token_id) == 5
    assert tokenizer.decode(prompt.token_ids) == prompt.text
    plain = PromptTemplate("chat").render(EXAMPLE, tokenizer)
    assert plain == "<s>user\n2 + 3 = ?</s>\n<s>assistant\n"


def test_worked_examples_and_an_instruction_in_the_users_message(tokenizer):
    """As lm-evaluation-harness' chat prompts without multiturn: one message of the user holds them all."""
    form = "Answer with a number.\n\n{examples}Question: {question}\nAnswer:"
    template = PromptTemplate({"system": "Add.", "user": form}, few_shot=[SHOT, SHOT])
    worked = "Question: 1 + 1 = ?\nAnswer: 1 + 1 = 2\n#### 2\n\n"
    asked = f"Answer with a number.\n\n{worked}{worked}Question: 2 + 3 = ?\nAnswer:"
    assert template.messages(EXAMPLE) == [{"role": "system", "content": "Add."}, {"role": "user", "content": asked}]
    assert encode_prompt(EXAMPLE, tokenizer, template).text == (
        f"<s>system\nAdd.</s>\n<s>user\n{asked}</s>\n<s>assistant\n"
    )
    bare = PromptTemplate({"user": form}).messages(EXAMPLE)
    assert bare[0]["content"] == "Answer with a number.\n\nQuestion: 2 + 3 = ?\nAnswer:"


def test_without_examples_in_it_the_users_form_is_that_of_every_turn():
    template = PromptTemplate({"user": "Level {level}: {question}"}, few_shot=[SHOT])
    assert template.messages(EXAMPLE) == [
        {"role": "user", "content": "Level 1: 1 + 1 = ?"},
        {"role": "assistant", "content": "1 + 1 = 2\n#### 2"},
        {"role": "user", "content": "Level 2: 2 + 3 = ?"},
    ]
    with pytest.raises(ValueError, match=r"template='\{topic\}' asks for \{topic\}; the columns are question, answer"):
        PromptTemplate({"user": "{topic}"}).messages(EXAMPLE)


def test_the_chat_template_writes_its_own_special_tokens_and_a_format_string_gets_bos_and_stays_open(tokenizer):
    bare = encode_prompt(EXAMPLE, tokenizer, PromptTemplate()).token_ids
    add_special_tokens(tokenizer, "<s> $A </s>")
    assert encode_prompt(EXAMPLE, tokenizer, PromptTemplate()).token_ids == [tokenizer.bos_token_id, *bare]
    ids = encode_prompt(EXAMPLE, tokenizer, PromptTemplate("chat")).token_ids
    assert ids[:1] == [tokenizer.bos_token_id] != ids[1:2]


@pytest.mark.parametrize("field", ["solution", "question.__class__", "", "0"])
def test_an_unknown_field_names_the_columns(field):
    with pytest.raises(ValueError, match=rf"asks for \{{{field}\}}; the columns are question, answer, level"):
        PromptTemplate(f"{{question}} {{{field}}}").render(EXAMPLE)


@pytest.mark.parametrize("form", ["{question!x}", "{question:d}", "{question:{width}}", "{question} {none:>5}"])
def test_a_field_that_cannot_be_written_so_names_the_template(form):
    with pytest.raises(ValueError, match=re.escape(f"template={form!r}: ")):
        PromptTemplate(form).render(Example("0", "2 + 3 = ?", "5", {"none": None}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "Solve it."}, "makes every prompt the same; put {question} into it"),
        ({"format": "{question"}, "write {{ or }} for a plain brace"),
        ({"format": {"user": "{question} {examples}"}}, "needs {question}, after {examples} if it has that"),
        ({"format": {"user": "{examples}{question"}}, "write {{ or }} for a plain brace"),
    ],
)
def test_a_template_that_cannot_work_is_refused_at_once(options, message):
    with pytest.raises(ValueError) as error:
        PromptTemplate(**options)
    assert message in str(error.value)


def test_a_prompt_without_tokens_or_a_chat_template_is_refused(tokenizer):
    empty = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    with pytest.raises(ValueError, match="the prompt of sum/0 has no tokens"):
        encode_prompt(EXAMPLE, empty, PromptTemplate())
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template; use a format string"):
        encode_prompt(EXAMPLE, tokenizer, PromptTemplate("chat"))


def numbered(n):
    return [Example(str(i), f"{i} + 1 = ?", str(i + 1)) for i in range(n)]


def ids(examples):
    return [example.example_id for example in examples]


@pytest.mark.parametrize(("size", "n"), [(10, 5), (10, 3), (10, 10), (7, 6), (1, 1)])
def test_contract_9_a_stopped_run_resumes_to_the_same_data_order(size, n):
    whole = PromptStream(numbered(size), seed=4)
    steps = [ids(whole.take_examples(n)) for _ in range(24)]
    stopped = PromptStream(numbered(size), seed=4)
    for step in range(24):
        resumed = PromptStream(numbered(size), seed=4)
        resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
        assert [ids(resumed.take_examples(n)) for _ in range(24 - step)] == steps[step:]
        assert resumed.state_dict() == whole.state_dict()
        stopped.take_examples(n)


def test_contract_23_another_column_that_rewards_read_is_refused():
    def with_tests(*tests):
        return PromptStream([Example(str(i), "2 + 2?", "4", {"tests": test}) for i, test in enumerate(tests)])

    state = json.loads(json.dumps(with_tests("a", "b").state_dict()))
    with_tests("a", "b").load_state_dict(state)
    with pytest.raises(ValueError, match="the training data have changed"):
        with_tests("a", "c").load_state_dict(state)
    del state["columns"]  # as version 0.2.0 has saved it
    with_tests("a", "c").load_state_dict(state)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 7])
def test_every_epoch_holds_every_example_once_and_no_step_holds_one_twice(n):
    stream = PromptStream(numbered(7), seed=0)
    steps = [ids(stream.take_examples(n)) for _ in range(35)]
    assert all(len(set(step)) == n for step in steps)
    taken = [example_id for step in steps for example_id in step]
    assert len(taken) == 35 * n
    for epoch in range(5 * n):
        assert sorted(taken[7 * epoch : 7 * epoch + 7]) == list("0123456")


def test_the_order_is_a_function_of_seed_and_epoch_alone():
    random.seed(0)
    first = ids(PromptStream(numbered(20), seed=0).take_examples(20))
    random.seed(1)
    stream = PromptStream(numbered(20), seed=0)
    assert ids(stream.take_examples(20)) == first
    assert ids(stream.take_examples(20)) != first
    assert ids(PromptStream(numbered(20), seed=1).take_examples(20)) != first


def test_other_data_or_another_seed_do_not_resume():
    state = PromptStream(numbered(5), seed=0).state_dict()
    with pytest.raises(ValueError, match="began with the data order of seed=0, not of seed=1"):
        PromptStream(numbered(5), seed=1).load_state_dict(state)
    changed = [*numbered(4), Example("4", "9 + 9 = ?", "18")]
    with pytest.raises(ValueError, match="training data have changed"):
        PromptStream(changed, seed=0).load_state_dict(state)


def test_a_step_larger_than_the_data_is_refused():
    stream = PromptStream(numbered(3))
    with pytest.raises(ValueError, match="cannot take 4 different prompts from 3 examples; use 1 to 3"):
        stream.take_examples(4)
    with pytest.raises(ValueError, match="cannot take 0"):
        stream.take_examples(0)
    with pytest.raises(ValueError, match="at least one example"):
        PromptStream([])


WEIGHTS = [
    {"a": 2, "b": 1},
    {"a": 1, "b": 1, "c": 1},
    {"a": 0.7, "b": 0.1, "c": 0.2},
    {"a": 1, "b": 2, "c": 3, "d": 5, "e": 50},
]


def _examples(label, count=60):
    return [Example(f"{label}/{i}", f"{label}{i} = ?", str(i)) for i in range(count)]


def _stream(weights, seed=3, count=60):
    return MixedStream({label: _examples(label, count) for label in weights}, weights, seed)


def _ids(examples):
    return [example.example_id for example in examples]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_counts_of_every_window_are_close_to_the_weights(weights):
    shares = [Fraction(str(weight)) / sum(Fraction(str(w)) for w in weights.values()) for weight in weights.values()]
    counts, prefixes = [0] * len(shares), [[0] * len(shares)]
    for number in range(1, 1001):
        counts[next_source(shares, counts)] += 1
        prefixes.append(list(counts))
        assert all(abs(count - number * share) < 1 for count, share in zip(counts, shares, strict=True))
    most = _stream(weights).most(16)
    windows = [[b - a for a, b in zip(*pair, strict=True)] for pair in zip(prefixes, prefixes[16:], strict=False)]
    assert all(count <= limit for window in windows for count, limit in zip(window, most.values(), strict=True))
    assert all(max(window[i] for window in windows) >= limit - 1 for i, limit in enumerate(most.values()))


def test_each_source_keeps_the_order_and_the_epochs_that_it_has_alone():
    stream = _stream({"a": 2, "b": 1}, count=7)
    taken = [name for _ in range(20) for name in _ids(stream.take_examples(6))]
    mixed = "".join(name[0] for name in taken)  # whole weights are met exactly
    assert all(mixed[i : i + 3].count("a") == 2 for i in range(0, len(mixed), 3))
    for label, count in (("a", 4), ("b", 2)):
        alone = PromptStream(_examples(label, 7), 3)
        expected = [name for _ in range(20) for name in _ids(alone.take_examples(count))]
        assert [name for name in taken if name[0] == label] == expected


def test_a_step_that_is_refused_takes_nothing_from_any_source():
    """Its counts had moved, and those of the sources before the one that is too small: the next steps were others."""
    sources = {"large": _examples("large"), "small": _examples("small", 2)}
    stream, other = (MixedStream(sources, {"large": 1, "small": 1}, 3) for _ in range(2))
    with pytest.raises(ValueError, match="cannot take 3 different prompts from 2 examples"):
        stream.take_examples(6)
    assert stream.state_dict() == other.state_dict()
    assert [_ids(stream.take_examples(4)) for _ in range(6)] == [_ids(other.take_examples(4)) for _ in range(6)]


@pytest.mark.parametrize("steps", [1, 4, 9])  # each source is in the middle of an epoch
def test_a_stream_goes_on_where_it_was_saved(steps):
    stream = _stream({"a": 2, "b": 1, "c": 0.3}, count=11)
    for _ in range(steps):
        stream.take_examples(5)
    state = json.loads(json.dumps(stream.state_dict()))
    wanted = [_ids(stream.take_examples(5)) for _ in range(12)]
    other = _stream({"a": 2, "b": 1, "c": 0.3}, count=11)
    other.take_examples(3)
    other.load_state_dict(state)
    assert [_ids(other.take_examples(5)) for _ in range(12)] == wanted


def test_a_changed_mix_is_refused_by_name():
    state = _stream({"a": 2, "b": 1}).state_dict()
    with pytest.raises(ValueError, match=r"data: the run began with a × 2, b × 1, and now has a × 3, b × 1"):
        _stream({"a": 3, "b": 1}).load_state_dict(state)
    with pytest.raises(ValueError, match="and now has a × 2, c × 1"):
        _stream({"a": 2, "c": 1}).load_state_dict(state)
    with pytest.raises(ValueError, match="source a: the training data have changed"):
        _stream({"a": 2, "b": 1}, count=59).load_state_dict(state)
    with pytest.raises(ValueError, match="source a: the run began with the data order of seed=3, not of seed=4"):
        _stream({"a": 2, "b": 1}, seed=4).load_state_dict(state)
    with pytest.raises(ValueError, match="the training data have changed"):
        PromptStream(_examples("a"), 3).load_state_dict(state)
    with pytest.raises(ValueError, match="the run began with one source, and now has a × 2, b × 1"):
        _stream({"a": 2, "b": 1}).load_state_dict(PromptStream(_examples("a"), 3).state_dict())

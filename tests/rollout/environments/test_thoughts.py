"""Contexts of later turns as a server shows them, where the chat template drops the thoughts of earlier ones.

Qwen3's template (huggingface.co/Qwen/Qwen3-0.6B, tokenizer_config.json) and others are those that TRL ships.
"""

from pathlib import Path

import pytest
import tokenizers
import torch
import trl
from transformers import PreTrainedTokenizerFast

from policies.presets import small_tokenizer
from rewards.isolation.chat_template import render
from rollout.environments.thoughts import TOOL, USER, costs, dropping, shown
from rollout.group import Completion, Prompt, RolloutGroup, Segment

TEMPLATES = Path(trl.__file__).parent / "chat_templates"


def tokenizer_with(template: str):
    tokenizer = small_tokenizer(["2 + 2 = 4\n", "Four. Sure?\n"] * 20)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = (TEMPLATES / f"{template}.jinja").read_text()
    return tokenizer


@pytest.fixture(scope="module")
def qwen3():
    return tokenizer_with("qwen3")


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def letters(tokenizer, text):
    """Ids that say the text, as a policy may choose them and no tokenizer would."""
    return [token for letter in text for token in tokenizer.encode(letter, add_special_tokens=False)]


def has(ids, part):
    return any(ids[place : place + len(part)] == part for place in range(len(ids)))


def of(tokenizer, messages, answers, **options):
    def rendered(these):
        return render(tokenizer, these, add_generation_prompt=True, **options)

    stops = [tokenizer.eos_token_id]
    return shown(tokenizer, rendered, messages, answers, stops), rendered(messages)


def test_contract_14_what_the_template_keeps_has_the_ids_that_were_sampled(qwen3):
    """Worked by hand: the thought is gone, the answer stands after the header in the tokens that were sampled, and the
    stop token is not written twice."""

    def ids(text):
        return qwen3.encode(text, add_special_tokens=False)

    said = [*ids("<think>\nadd\n</think>\n\n"), *letters(qwen3, "Four."), qwen3.eos_token_id]
    messages = [user("2 + 2?"), assistant("<think>\nadd\n</think>\n\nFour."), user("Sure?")]
    context, text = of(qwen3, messages, {1: said})
    header = "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    after = "\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
    assert text == f"{header}Four.<|im_end|>{after}"
    assert context == [*ids(header), *letters(qwen3, "Four."), qwen3.eos_token_id, *ids(after)]
    assert context != ids(text)  # a server that tokenises all of it would have others, of the same text
    assert qwen3.decode(context) == text


def test_tool_loops_of_qwen3_keep_their_thoughts_and_calls_are_written_as_the_template_does(qwen3):
    """Its rule counts from the last message of a user. A call in other blanks is shown in the template's own."""
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    before, inside = "<think>\nadd\n</think>\n\nI add.\n<tool_call>\n", '{"name":"add","arguments":{"a":1}}'
    said = [*letters(qwen3, f"{before}{inside}\n</tool_call>"), qwen3.eos_token_id]
    messages = [user("2?"), assistant("<think>\nadd\n</think>\n\nI add.", tool_calls=[call])]
    messages.append({"role": "tool", "name": "add", "content": "3"})
    context, text = of(qwen3, messages, {1: said})
    assert f'{before}{{"name": "add", "arguments": {{"a": 1}}}}\n</tool_call><|im_end|>' in text
    assert qwen3.decode(context) == text
    start = len(qwen3.encode(text.partition("<think>")[0], add_special_tokens=False))
    kept = letters(qwen3, before + '{"name":')
    assert context[start : start + len(kept)] == kept
    spaced = [*letters(qwen3, before + '{"name": "add", "arguments": {"a": 1}}\n</tool_call>'), qwen3.eos_token_id]
    context, _ = of(qwen3, messages, {1: spaced})
    assert context[start : start + len(spaced)] == spaced


@pytest.mark.parametrize(
    "template",
    ["qwen3", "deepseek_r1_distill", *(pytest.param(t, marks=pytest.mark.slow) for t in ("glm4moe", "phi3"))],
)
def test_contexts_of_random_answers_say_what_the_template_says(template):
    """Whatever was sampled, broken characters and marks included; what is kept of an answer is its end."""
    tokenizer, generator = tokenizer_with(template), torch.Generator().manual_seed(1)
    ends, kept = tokenizer.convert_tokens_to_ids("</think>"), 0
    for _ in range(12):
        messages, answers = [user("2 + 2?")], {}
        for turn in range(3):
            ids = torch.randint(2, 256, (12,), generator=generator).tolist()
            ids[5 : 5 + turn % 2] = [ends]
            answers[len(messages)] = [*ids, tokenizer.eos_token_id]
            messages += [assistant(tokenizer.decode(ids)), user("Sure?")]
        context, text = of(tokenizer, messages, answers)
        assert tokenizer.decode(context) == text or "\ufffd" in text
        kept += has(context, answers[5][-4:-1])
    assert kept > 8


@pytest.mark.parametrize(
    ("template", "after"),
    [("qwen3", [USER]), ("deepseek_r1_distill", [USER, TOOL]), ("llama3_1", [TOOL]), ("qwen2_5", []), ("idefics3", [])],
)
def test_which_templates_drop_thoughts(template, after):
    """DeepSeek-R1's does so always, and Llama's shows a call without what stood before it."""
    assert dropping(tokenizer_with(template)) == after
    assert dropping(small_tokenizer(["2\n"])) == []


def test_costs_by_hand():
    """Three texts, of which the second begins with [1, 2] of the first, and the third with [1, 2, 6] of the second."""
    segments = [Segment(0, [1, 2]), Segment(2, [1, 2, 6, 4]), Segment(3, [1, 2, 6, 9, 9])]
    forked = Completion([5, 6, 7, 8], [-0.1] * 4, "", "stop", 0, segments=segments)
    plain = Completion([5, 6], [-0.1] * 2, "", "stop", 0)
    groups = [RolloutGroup(Prompt("a", "", [1, 2]), [forked, plain])]
    assert costs(groups) == {"branches/rows": 2, "branches/tokens": 4}


def lines(messages):
    """A template that shows every message as a line, without the word `hm`."""
    return "".join(f"{message['role']}: {message['content'].replace('hm', '')}\n" for message in messages)


def test_a_tokenizer_that_reads_a_beginning_otherwise_gets_the_whole_text_in_one_piece():
    """SentencePiece's put a blank before the first word of whatever they encode, so pieces would have blanks that the
    template has not. Then the context is the text's, and the answer's own tokens are given up."""
    pieces = tokenizers.Tokenizer(tokenizers.models.BPE())
    pieces.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always")
    pieces.decoder = tokenizers.decoders.Metaspace(prepend_scheme="always")
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=80, initial_alphabet=sorted("userasitn: 2+Four.S?\n"))
    pieces.train_from_iterator(["user: 2 + 2?\nassistant: Four.\nuser: Sure?\n"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces)
    said = [tokenizer.convert_tokens_to_ids(letter) for letter in "Four."]
    messages = [user("2 + 2?"), assistant("Four."), user("Sure?")]
    context = shown(tokenizer, lines, messages, {1: said}, [])
    assert context == tokenizer.encode(lines(messages), add_special_tokens=False)
    assert tokenizer.decode(context) == lines(messages)


def test_contract_14_halves_of_a_character_stay_the_tokens_that_were_sampled(qwen3):
    """Two thirds of one, around a word that the template drops: together they read as another text, and nothing that
    could be encoded would read better."""
    first, second, _ = [qwen3.convert_tokens_to_ids(each) for each in qwen3.tokenize("\u20ac")]
    said = [first, *letters(qwen3, "hm"), second]
    messages = [user("2?"), assistant(qwen3.decode(said)), user("So?")]
    context = shown(qwen3, lines, messages, {1: said}, [])
    assert qwen3.decode(context) != lines(messages)
    assert has(context, [first, second])


def test_an_answer_that_the_template_does_not_show_is_left_to_it(qwen3):
    """And so is one that stands before another in the text: nobody can tell which of its words are the answer's."""

    def last_only(messages):
        return lines(messages[-2:])

    def turned(messages):
        return lines(messages[::-1])

    one, two = letters(qwen3, "Four."), letters(qwen3, "Sure.")
    messages = [user("2 + 2?"), assistant("Four."), user("Sure?"), assistant("Sure."), user("So?")]
    answers = {1: [*one, qwen3.eos_token_id], 3: [*two, qwen3.eos_token_id]}
    for rendered, kept, given_up in ((last_only, two, one), (turned, one, two)):
        context = shown(qwen3, rendered, messages, answers, [qwen3.eos_token_id])
        assert qwen3.decode(context) == rendered(messages)
        assert has(context, kept)
        assert not has(context, given_up)
        assert qwen3.eos_token_id not in context  # this template writes no end of a turn

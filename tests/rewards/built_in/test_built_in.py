"""Format, length, text, equivalence and remote rewards, against hand-worked numbers and other implementations."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from local_server import serving

from rewards import RewardSpec, Scorer
from rewards.built_in.format import gsm8k_format, regex_format, tag_format
from rewards.built_in.length import length_penalty, repetition_penalty, soft_overlong_punishment
from rewards.built_in.notation import in_latex, readable
from rewards.built_in.remote import remote

TAGS = {
    1.0: [
        "<think>a</think><answer>b</answer>",
        "\n<think>\na < b\n</think>\n\n<answer>b</answer> \n",
        "<think></think><answer></answer>",
    ],
    0.0: [
        "so <think>a</think><answer>b</answer>",
        "<think>a</think> so <answer>b</answer>",
        "<think>a</think><answer>b</answer> so",
        "<answer>b</answer><think>a</think>",
        "<think>a<answer>b</answer></think>",
        "<think>a</think><answer>b</answer><answer>c</answer>",
        "<think>a</think><answer>b",
        "",
    ],
}
MARKS = {
    1.0: ["6 * 7 = 42\n#### 42", "#### -1,234.5\n", "#### $42"],
    0.0: ["#### 42 apples", "#### 42.", "#### 42\nDone.", "#### 41\n#### 42", "####\n42", "#### 1,23", "42", ""],
}


@pytest.mark.parametrize(("reward", "texts"), [(tag_format, TAGS), (gsm8k_format, MARKS)])
def test_forms(reward, texts):
    for mark, alike in texts.items():
        for text in alike:
            assert reward(None, [text]) == [mark], text


def test_forms_with_arguments():
    assert tag_format(None, ["<a>1</a>", "<b>1</b>"], tags=["a"]) == [1.0, 0.0]
    assert regex_format(None, ["say yes", "no"], pattern=r"yes\Z") == [1.0, 0.0]
    assert regex_format(None, [[{"role": "assistant", "content": "yes"}]], pattern="y") == [1.0]


def test_length_penalty():
    ids = [[0] * 120, [0] * 100, [0] * 90]
    assert length_penalty(None, ids, ids, target=100, per_token=0.01) == pytest.approx([-0.2, 0.0, 0.0])
    assert length_penalty(None, ids, ids, target=100, per_token=0.01, exact=True) == pytest.approx([-0.2, 0.0, -0.1])


@pytest.mark.parametrize("ngram", [1, 2, 3])
def test_repetition_penalty_equals_trl(ngram):
    peer = pytest.importorskip("trl.rewards").get_repetition_penalty_reward(ngram_size=ngram, max_penalty=-0.5)
    ids = [[], [1], [1, 2, 3, 4], [5] * 9, [1, 2] * 5, [1, 2, 3] * 4]
    assert repetition_penalty(None, ids, ids, ngram=ngram, max_penalty=-0.5) == pytest.approx(peer(completion_ids=ids))


def test_soft_overlong_punishment_equals_trl():
    peer = pytest.importorskip("trl.rewards").get_soft_overlong_punishment(100, 20)
    ids = [[0] * length for length in (0, 79, 80, 81, 90, 99, 100, 101, 500)]
    ours = soft_overlong_punishment(None, ids, ids, max_length=100, cache_length=20)
    assert ours == pytest.approx(peer(completion_ids=ids))
    assert ours[4] == -0.5
    assert soft_overlong_punishment(None, ids, ids, max_length=100, cache_length=0)[-3:] == [0.0, -1.0, -1.0]
    with pytest.raises(ValueError, match="cache_length=200 must be between 0 and max_length=100"):
        soft_overlong_punishment(None, [""], [[1]], max_length=100, cache_length=200)
    with pytest.raises(ValueError, match="ngram=0"):
        repetition_penalty(None, [""], [[1]], ngram=0)


def test_math_equivalence():
    pytest.importorskip("math_verify")
    from rewards.built_in.equivalence import math_equivalence

    texts = [r"so $\frac{1}{2}$", r"\boxed{0.5}", "#### 1/2", "so 2", "no idea", ""]
    assert math_equivalence(None, texts, answer=["#### 0.5"] * 6) == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert math_equivalence(None, ["$x+1$"], answer=["$1 + x$"]) == [1.0]
    assert math_equivalence(None, ["#### 18"], answer=["9 * 2 = <<9*2=18>>18\n#### 18"]) == [1.0]
    with pytest.raises(ValueError, match="cannot read the gold answer ''"):
        math_equivalence(None, ["1"], answer=["#### "])
    with ThreadPoolExecutor(1) as pool:  # its limit of time is none of the main thread
        assert pool.submit(math_equivalence, None, ["$1/2$"], answer=["0.5"]).result() == [1.0]


GOLDS = [  # a gold answer, a completion that is right, and one that is wrong
    (r"2\sqrt{3}", r"$2\sqrt{3}$", "2"),
    (r"3\pi", r"$3\pi$", "3"),
    ("(3, 5)", "$(3, 5)$", "5"),
    ("6 - 5i", "$6 - 5i$", "5"),
    ("2^{10}", "1024", "2"),
    ("1,000", "1000", "0"),
    ("12 apples", "12", "13"),
    ("10**2", "100", "10"),
    ("50%", r"$50\%$", "5"),
    ("3, 5", "$3, 5$", "5"),
    ("1, 2, 3", r"\boxed{1, 2, 3}", "3"),
    ("6xy", "$6xy$", "6"),
    ("2 pi", r"$2\pi$", "2"),
    ("2pi", r"$2\pi$", "2"),
    ("-$5", "-5", "5"),
    ("$1,200.50", "1200.5", "1"),
    ("3 1/2", "3.5", "1.5"),
    ("-3 1/2", r"$-\frac{7}{2}$", "1"),
    ("2sqrt(3)", r"$2\sqrt{3}$", "2"),
    (".5", "0.5", "5"),
]


def test_a_gold_without_delimiters_is_read_whole():
    pytest.importorskip("math_verify")
    from rewards.built_in.equivalence import math_equivalence

    for gold, right, wrong in GOLDS:
        assert math_equivalence(None, [right, wrong], answer=[gold] * 2) == [1.0, 0.0], gold


FORMS = [  # a completion, and a gold answer that it equals
    *[("+42", "42"), ("1e3", "1000"), ("2.5e-3", "0.0025"), ("1.5×10^3", "1500"), (r"1.5\times10^{-3}", "0.0015")],
    *[("\u22125", "-5"), ("so $\u22125$", "-5"), ("４２", "42"), ("１，０００", "1000"), ("－５", "-5")],
    *[("1,000", "1000"), ("1000.0", "1000"), ("1 000", "1000"), (r"1{,}000", "1000"), (r"1\,000", "1000")],
    *[("1.000.000", "1000000"), ("50%", "50"), (r"50\%", "0.5"), ("$50", "50"), (r"\$50", "50"), ("50 km/h", "50")],
    *[(r"\dfrac{1}{2}", "0.5"), (r"\frac34", "3/4"), ("3 3/4", "15/4"), ("½", "0.5"), ("7½", "7.5"), ("-3/4", "-0.75")],
    *[("(1, 2)", "(1,2)"), ("[0, 1)", "[0,1)"), ("(\u2212∞, 3]", r"(-\infty, 3]"), ("(0.5, 1)", r"(\frac12, 1)")],
    *[("{2, 1}", r"\{1,2\}"), ("1, 2, 3", "3, 2, 1"), ("1/3, 1/2", r"\frac{1}{2}, \frac{1}{3}")],
    *[("x^{2}+1", "1+x^2"), ("x²", "x^2"), ("2√3", r"2\sqrt{3}"), ("π/2", r"\frac{\pi}{2}"), ("ln(2)", r"\ln 2")],
    *[("1" + 400 * "0", "1" + 400 * "0"), ("0.00012", r"1.2\times 10^{-4}")],
    *[("The answer is **42**.", "42"), ("Answer: (3, 4)", "(3,4)"), ("#### (3, 4)", "(3,4)"), ("(A)", "A")],
    *[("<answer>3/4</answer> as I said 5", "0.75"), ("no solution", "no solution"), (r"\text{odd}", "odd")],
    *[("The answer is C.", "C"), ("**Answer: A**", "(A)"), ("#### even", r"\text{even}"), ("Answer: x", "x")],
    *[("The area is 10π.", r"10\pi"), ("8√3 square cm", r"8\sqrt{3}"), (r"Answer: 8\sqrt{3} cm", r"8\sqrt{3}")],
    *[(r"It is 1\,234.", "1234"), ("They are 1.000.000.", "1000000"), ("That is 3 1/2.", "3.5"), ("so ½", "1/2")],
    *[("<think>5 or 6</think>\nYes", "Yes"), (r"<think>\boxed{5}? No.</think> It is 6.", "6"), ("101_2", "101_2")],
]
EXPLOITS = [  # a completion that names the gold answer, or a part of it, and another gold answer
    *[
        ("it is not 42", "42"),
        ("The answer is not 42.", "42"),
        ("The answer isn't $42$", "42"),
        ("$42$ is wrong", "42"),
    ],
    *[(r"\neq 42", "42"), ("$41=42$", "42"), (r"\boxed{42=43}", "42"), (r"$\leq 3$", "3"), ("x > 3", "3")],
    *[("42 or 43", "42"), (r"\boxed{42}, \boxed{43}", "42"), (r"$\pm 42$", "42"), ("42, 43", "42"), ("42_5", "42")],
    *[("$1 1/2$", "1"), (r"$1 - \frac{1}{\mathrm{e}}$", "1"), ("1.000.000", "1"), ("1,000", "1"), ("5-", "5")],
    *[("1e-7", "2e-7"), ("$0.0000001$", "0.0000002"), ("(1,2)", "(2,1)"), ("[1,2)", "(1,2]"), ("6xyz", "6")],
    *[("The area is 10π.", "10"), ("8√3 square cm", "8"), ("It would be x^2.", "2"), ("101_3", "101_2")],
    *[(r"It is 1\,234.", "1"), ("They are 1.000.000.", "1"), ("That is 3 1/2.", "1/2"), ("That is 3 1/2.", "3")],
    *[("Answer: B", "A"), ("The answer is not C.", "C"), ("#### odd", "even"), ("1 " + 200 * "no " + "so 2", "1")],
    *[("the answer: 42 or 43", "42"), ("42 or 43", "43"), ("$40=41=42$", "42"), ("42~43", "42"), ("42\u201343", "42")],
    *[
        ("99999999!", "42"),
        ("5!!!!", "42"),
        ("2^{9999999999}", "42"),
        ("east", "seat"),
        ("odd", "dod"),
        ("A or B", "A"),
        ("12345678901234567890", "12345678901234567891"),
    ],
]


def test_math_equivalence_reads_the_forms_of_an_answer_and_pays_for_no_answer_that_is_only_named():
    pytest.importorskip("math_verify")
    from rewards.built_in.equivalence import math_equivalence

    completions, golds = zip(*FORMS, *EXPLOITS, strict=True)
    scores = math_equivalence(None, list(completions), answer=list(golds))
    assert [form for form, score in zip(FORMS, scores, strict=False) if score != 1.0] == []
    assert [exploit for exploit, score in zip(EXPLOITS, scores[len(FORMS) :], strict=True) if score] == []


QUANTITIES = [  # a gold answer, completions that are equal to it, and others that are not
    ("12:30", ["12:30", "The train leaves at 12:30.", r"\boxed{12:30}", "12:30 PM"], ["4:10", "5:30 or 4:10", "0.4"]),
    ("5:30 PM", ["17:30", "5:30"], ["5:30 AM", "5:31 PM", "not 5:30"]),
    ("2:4", ["1:2"], ["1:3"]),
    ("101_2", ["101_2", "$101_{2}$"], ["101", "101_3", "1101_2"]),
    (
        "10 m",
        ["10", "10 m", "10 metres", r"$10\text{ m}$"],
        ["10 cm", r"\boxed{10\text{ cm}}", "10 m^2", "It is 10 km"],
    ),
    ("1,000 km/h", ["1,000 km/h", "1000 km per hour"], ["1,000 m/s", "It is 1,000 m"]),
    ("3 apples", ["3 apples", "3"], ["4 apples"]),
    ("[1,2]", [r"1 \le x \le 2", r"so $1 \leq x \leq 2$", "so it is [1, 2]."], [r"1 < x \le 2", r"1 \le x \le 3"]),
    (r"(2,\infty)", ["$x > 2$", "2 < x"], ["$x < 2$", r"x \geq 2"]),
    (r"(0,1) \cup (2,3)", [r"so (0,1) \cup (2,3).", r"(2,3) ∪ (0,1)"], ["(0,1)", "3", r"(0,1) \cap (2,3)"]),
    ("3x", ["3x", "I get 3x."], ["3", "I get 3x + 1."]),
    (
        "3",
        ["so x = 3", "5 - 2 = 3", "**3**", "3 km", "Wow, 3!"],
        ["I get 3x.", "x^2 + 3 is it", "I get log 3.", "5 - 3 people"],
    ),
    (r"2 \pi r h", [r"$2 \pi r h$", r"$2h\pi r$"], [r"$2 \pi r$"]),
    ("3t", ["3t", r"\boxed{3t}", "Answer: 3t."], ["3", "3c"]),
    ("3ab", ["3ab", "$3ba$"], ["3"]),
    (
        "5",
        [r"He needs at least $\boxed{5}$", "At least 4? #### 5"],
        ["at least 5", "more than $5$", "5 or more", "up to 5"],
    ),
    ("1000", ["It is 1,000"], ["It is not 1,000"]),
    (
        "May 5, 2020",
        ["5 May 2020", "It was on May 5th, 2020.", "May 5, 2020. Maybe 6 people came."],
        ["May 6, 2020", "May 5", "April 5, 2020 or May 6, 2020"],
    ),
    ("2020-05-06", ["2020-05-06", "on 2020-05-06."], ["2020-06-05", "2009", "2020-05-06 or 2020-06-05"]),
    ("12/25/2024", ["12/25/2024"], ["12/25", "25/12/2024"]),
    ("E'", ["E'", r"$E^{\prime}$"], ["E", "E''"]),
    ("2x", ["$f'(x) = 2x$", "y' = 2x"], ["$f'(x)$"]),
    ("1234", ["1\u00a0234", "1\u202f234", "1\u2009234", "\ufeff1234", "It's 1,234"], ["1\u00a0235"]),
    ("25%", ["25 percent", "25 %", "0.25"], ["0.25%", "26 percent"]),
    ("1, 2", ["1 and 2", "1 or 2", "x=1 and x=2", "2, 1"], ["1", "1 or 3"]),
    ("56017895760", [r"56,\!01,\!78,\!95,\!760"], [r"56,\!01"]),
    ("0", ["0", "0/5"], ["0/0", "1/0"]),
    ("5000000", ["5 million", "so 5 million people", r"\$5 million", "5,000 thousand"], ["5", "5 billion"]),
    ("5", ["5", "5 people"], ["5 million", "so 5 million people"]),
    ("50", ["€50", "so 50€"], ["€5"]),
    ("(1,2)", ["(1, 2)", r"$\left(1,2\right)$", "1,2"], [r"\{1,2\}", r"so $\boxed{\{1, 2\}}$", "(2,1)", "[1,2]"]),
    (r"\{1,2\}", [r"\{2,1\}", "1 and 2"], ["(1,2)", r"\boxed{(1,2)}"]),
    ("(1,2), (3,4)", ["(3,4), (1,2)"], ["(1,2), (4,3)"]),
    ("x^2", ["x^2", "$f(x) = x^2$"], ["X^2", "$X^2$", r"\boxed{X^{2}}"]),
    ("2x", ["y = 2x", "Y = 2x", r"2\,x"], ["2X"]),
    (r"\sin x", [r"$\sin x$"], [r"$\sin X$"]),
    ("A", ["a", "(A)", r"\boxed{a}"], ["B"]),
    ("no", ["No", r"\boxed{no}", r"$\text{no}$", "#### no"], ["on", r"\boxed{on}", "The answer is on."]),
    ("xy", ["yx", r"\boxed{yx}"], ["xz"]),
    ("3", [r"\boxed{2}? No, \boxed{3}.", r"$\boxed{2}$ is too small, so $\boxed{3}$"], [r"\boxed{3} no, \boxed{2}"]),
    ("3", ["3"], [r"\boxed{1} and \boxed{3}", r"$\boxed{3}$, $\boxed{1}$", r"\boxed{1} or \boxed{3}"]),
    ("1, 3", [r"\boxed{1} and \boxed{3}", r"\boxed{0} no, \boxed{1}, \boxed{3}"], [r"\boxed{1}, so \boxed{3}"]),
    ("3/10", ["3:10", "the ratio is 3:10"], ["3:9"]),
    ("3:10", ["3:10", "The ratio is 3:10."], ["3/10", "6:20"]),  # it may be a time
    ("18 m^2", ["18", "18 m^2", "18 m²", r"18\text{ m}^2", "18 square meters"], ["18 cm^2", "18 m", "18m^3"]),
    ("18", ["18 m^2", "≈18", "≈ 18", "~18", "The area is ≈18.", "x ≈ 18"], ["18m^2", "≈19", "~ 19"]),
    ("18m^2", ["18m^2"], ["18"]),
    (
        "42",
        [r"\boxed {42}", r"\boxed{42.}", r"$\boldsymbol{42}$"],
        [r"\boxed{42\text{ million}}", r"$42~\text{thousand}$"],
    ),
    ("42000000", [r"\boxed{42\text{ million}}", r"$42\ \text{million}$"], [r"\boxed{42}"]),
    ("1/3", [r"$0.\overline{3}$", r"\boxed{0.\overline{33}}"], ["0.3", r"$0.0\overline{3}$"]),
    (r"0.1\overline{6}", [r"$\frac{1}{6}$"], [r"$0.\overline{16}$", "0.1"]),
    ("0", ["0.0"], [r"$0.\overline{3}$"]),
    (r"33\frac13 \%", [r"\boxed{33\frac{1}{3}\%}", "1/3"], [r"$33\frac23\%$", r"\boxed{33}", "33%"]),
    ("33", ["33%"], [r"$33\frac13\%$"]),
    ("0.5", [r"\boxed{0{,}5}", r"$0{,}5$"], [r"$0{,}55$", "5"]),
    ("3:30", [r"\boxed{3{:}30}"], [r"\boxed{3{:}31}"]),
    (r"\emptyset", [r"\boxed{\varnothing}"], [r"\boxed{0}"]),
    (r"\langle 1, 2 \rangle", [r"$\langle 1,2\rangle$", "(1, 2)"], [r"$\langle 2,1\rangle$"]),
    ("B", ["The correct option is (B)."], ["The correct option is (C)."]),
]


@pytest.mark.parametrize(("gold", "equal", "unequal"), QUANTITIES)
def test_math_equivalence_compares_times_bases_units_bounds_sets_and_variables(gold, equal, unequal):
    pytest.importorskip("math_verify")
    from rewards.built_in.equivalence import math_equivalence

    texts = equal + unequal
    scores = math_equivalence(None, texts, answer=[gold] * len(texts))
    assert dict(zip(texts, scores, strict=True)) == dict.fromkeys(equal, 1.0) | dict.fromkeys(unequal, 0.0)


HOSTILE = [
    "####",
    r"\boxed{",
    "1,",
    "1.",
    "1e5",
    "1 1/2 ",
    "answer 1 ",
    "is +1",
    "√(",
    r"\text{",
    "１",
    "1\\,000",
    "not ",
    "$1$ ",
]


@pytest.mark.parametrize("unit", [*HOSTILE, "t\n", "r h ", "3 "])
def test_a_hundred_thousand_characters_are_rewritten_in_bounded_time(unit):
    text = (unit * 100_000)[:100_000]
    started = time.process_time()
    in_latex(readable(text))
    assert time.process_time() - started < 2.0  # quadratic time would take minutes


@pytest.mark.parametrize(
    "unit", ["(\\a", "(1", "1 - ", "x_{1}", "\\frac{1}", "3t ", "1,", "{1}", "May 5 ", "12:30 ", "1! "]
)
def test_an_expression_is_found_in_prose_in_bounded_time(unit):
    pytest.importorskip("math_verify")
    from rewards.built_in.equivalence import math_equivalence

    started = time.process_time()
    math_equivalence(None, ["so it is " + unit * 500], answer=["7"])
    assert time.process_time() - started < 5.0  # exponential time would never end


def test_math_equivalence_runs_no_text_as_code(tmp_path):
    pytest.importorskip("math_verify")
    from rewards.built_in.equivalence import math_equivalence

    code = f"__import__('pathlib').Path('{tmp_path}/run').touch()"
    forms = ["%s", "$%s$", r"\boxed{%s}", "#### 1+%s", r"$\text{%s}$", r"$x \land \operatorname{%s}$", "(1)+(%s)"]
    assert math_equivalence(None, [form % code for form in forms], answer=["42"] * len(forms)) == [0.0] * len(forms)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_number_beyond_all_bounds_is_a_failure_and_no_hang():
    pytest.importorskip("math_verify")
    with Scorer([RewardSpec("math_equivalence")], timeout_s=1.5, on_error="drop_sample") as scorer:
        [score] = scorer.score(["p"], [["10**10**10"]], [{"answer": "42"}], prompt_ids=["a"])
    assert [error.kind for error in score.errors] == ["timeout"]


class Grader(BaseHTTPRequestHandler):
    """Answers with the next of `server.answers`: (status, body) or a delay in seconds."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.seen.append((dict(self.headers), json.loads(body)))
        answer = self.server.answers.pop(0)
        if isinstance(answer, float):
            time.sleep(answer)
            answer = (200, {})
        self.send_response(answer[0])
        self.end_headers()
        self.wfile.write(json.dumps(answer[1]).encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = HTTPServer(("127.0.0.1", 0), Grader)
    server.seen = []
    server.url = f"http://127.0.0.1:{server.server_port}/grade"
    with serving(server):
        yield server


def ask(server, **options):
    return remote(
        ["p"] * 2, ["a", "b"], server.url, backoff_s=0.01, answer=["1", "2"], trainer_state=object(), **options
    )


def test_remote_sends_columns_and_returns_rewards(server, monkeypatch):
    monkeypatch.setenv("GRADER_TOKEN", "secret")
    server.answers = [(200, {"rewards": [1.0, None]})]
    assert ask(server, token_variable="GRADER_TOKEN") == [1.0, None]
    headers, body = server.seen[0]
    assert headers["Authorization"] == "Bearer secret"
    assert body == {"prompts": ["p", "p"], "completions": ["a", "b"], "columns": {"answer": ["1", "2"]}}


@pytest.mark.parametrize(
    ("answers", "said", "options"),
    [
        ([(503, {}), (429, {}), (200, {"rewards": [1.0, 0.0]})], None, {}),
        ([(400, {"error": "no such task"})], r"no usable answer after 1 tries: HTTP 400 .*no such task", {}),
        ([0.2, 0.2], r"no usable answer after 2 tries: .*timed out", {"retries": 1, "request_timeout_s": 0.05}),
        ([(200, [1.0, 0.0])], r'instead of \{"rewards"', {}),
    ],
)
def test_remote_tries_again_under_the_same_key_and_gives_up_loudly(server, answers, said, options):
    server.answers = [*answers]
    if said is None:
        assert ask(server) == [1.0, 0.0]
    else:
        with pytest.raises(RuntimeError, match=said):
            ask(server, **options)
    if not options:  # a request that timed out may not be read yet
        assert len(server.seen) == len(answers)
    assert len({headers["Idempotency-Key"] for headers, _ in server.seen}) == 1


def test_remote_refuses_other_schemes_and_unset_tokens():
    with pytest.raises(ValueError, match="http:// or https://"):
        remote(["p"], ["c"], "file:///etc/passwd")
    with pytest.raises(ValueError, match="'NO_SUCH_TOKEN' is not set"):
        remote(["p"], ["c"], "http://127.0.0.1:9", token_variable="NO_SUCH_TOKEN")

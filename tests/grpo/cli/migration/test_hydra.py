"""Words of a command are read as Hydra reads them. The values are those that hydra-core 1.3.2 gave for these texts."""

import pytest

from grpo.cli.migration.hydra import Override, overrides, resolved, value_of

VALUES = {
    **{
        "1": 1,
        "-1": -1,
        "+1": 1,
        "1_000": 1000,
        "1e-6": 1e-6,
        "1E+5": 1e5,
        ".5": 0.5,
        "1.": 1.0,
        "-inf": float("-inf"),
    },
    **{
        "True": True,
        "FALSE": False,
        "null": None,
        "NULL": None,
        "None": "None",
        "yes": "yes",
        "on": "on",
        "tru": "tru",
    },
    **{"": "", "''": "", "'1'": "1", '"x y"': "x y", "x y": "x y", " 1": 1, "1 ": 1, r"'a\'b'": "a'b", "'[1]'": "[1]"},
    **{"0x10": "0x10", "010": "010", "1__0": "1__0", "1.2.3": "1.2.3", "12:30": "12:30", "2024-01-01": "2024-01-01"},
    **{"[]": [], "[ 1 , 2]": [1, 2], "['a','b']": ["a", "b"], "[a b]": ["a b"], "[1,[2,[]]]": [1, [2, []]]},
    **{"[true,null,1.5,'1']": [True, None, 1.5, "1"], "[a: b]": ["a: b"], '["console","wandb"]': ["console", "wandb"]},
    **{
        "{}": {},
        "{b:1}": {"b": 1},
        "{b: 1, c: [x,y]}": {"b": 1, "c": ["x", "y"]},
        "{1:2}": {1: 2},
        "{a:b c}": {"a": "b c"},
    },
    **{"[{a:['x'],type:y}]": [{"a": ["x"], "type": "y"}], r"{m.\{*\}:{},b:x}": {"m.{*}": {}, "b": "x"}},
    **{r"a\=b": "a=b", r"a\,b": "a,b", r"\[1\]": "[1]", r"a\ b": "a b", r"x\ ": "x ", r"a\:b": "a:b", r"a\\b": r"a\b"},
    **{"/a/b": "/a/b", "hdfs://x/y": "hdfs://x/y", "x: y": "x: y", "- x": "- x", "|x": "|x", "*": "*", "@x": "@x"},
    **{"${data.x}": "${data.x}", "x${a}y": "x${a}y", "${a:b,c}": "${a:b,c}"},
    **{"<path>": "<path>", "x#y": "x#y", "a=b": "a=b", "[1": "[1", "'x": "'x", "[a]b": "[a]b"},  # Hydra refuses these
}


@pytest.mark.parametrize("text", VALUES)
def test_a_value_is_the_one_that_hydra_reads(text):
    value = value_of(text)
    assert (type(value), value) == (type(VALUES[text]), VALUES[text])


@pytest.mark.parametrize("text", ["a,b", "1,2", "'a','b'", "[1],[2]"])
def test_several_values_are_an_error(text):
    with pytest.raises(ValueError, match="several values"):
        value_of(text)


def test_the_words_of_a_command():
    words = ["a=1", "+b.c=x=y", "++d=", "~e", "~f=2", "-m", "--multirun", "-cn", "name", "--config-path=/x", "g"]
    assert list(overrides(words)) == [
        Override("a", "1"),
        Override("b.c", "x=y"),
        Override("d", ""),
        Override("e", "", deletes=True),
        Override("f", "2", deletes=True),
        Override("--config-name", "name"),
        Override("--config-path", "/x"),
    ]


def test_a_value_that_refers_to_another():
    values = {"a": 4, "b": "${a}", "c": "x${b}", "loop": "${loop}"}
    assert resolved("${b}", values.__getitem__) == 4
    assert resolved(["${c}", {"k": "${a}${a}"}], values.__getitem__) == ["x4", {"k": "44"}]
    for text in ("${loop}", "${nobody}", "${.a}"):
        with pytest.raises(KeyError):
            resolved(text, values.__getitem__)

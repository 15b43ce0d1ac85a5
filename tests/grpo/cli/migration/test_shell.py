"""Shell scripts are read as bash runs them. The scripts have the forms of verl's own; bash with stubs is the oracle."""

import os
import re
import shutil
from pathlib import Path

import pytest

from grpo.cli.migration.verl_command import _assignments, _value, overrides, read_overrides, read_verl_command
from tests.cases.bash_oracle import PROGRAM, words_of_bash

PPO = f"python3 -m {PROGRAM}"
BASH = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not here")
DEVICE = "DEVICE=${DEVICE:-$(python3 -c 'import torch_of_nobody' 2>/dev/null && echo npu || echo gpu)}"
BY_DEVICE = f"""#!/usr/bin/env bash
set -xeuo pipefail
{DEVICE}
MACHINE=${{MACHINE:-}}
batch=${{TRAIN_BATCH_SIZE:-1024}}
mini=${{MINI:-256}}
response=2048
case "${{DEVICE}}" in
    gpu | npu) ;;
    *)
        echo "DEVICE must be gpu or npu, got: ${{DEVICE}}" >&2
        exit 1
        ;;
esac
EXTRA=()
case "${{DEVICE}}" in
    gpu)
        case "${{MACHINE}}" in
            gb200) EXTRA+=(c.eager=True "+c.gpus=4") ;;
            *) gpus=8 ;;
        esac
        ;;
    npu)
        export HCCL_TIMEOUT=1500
        batch=16
        mini=16
        response=$((1024 * 32))
        if [ "${{MACHINE}}" = old ]; then
            EXTRA+=(
                c.old=1   # a comment
            )
        fi
        ;;
esac
DATA=(
    data.train_batch_size=${{batch}}
    data.max_response_length=${{response}}
)
LAUNCH=(python3)
if [ "${{USE_UV:-1}}" != 0 ] && {{ [ "${{DEVICE:-gpu}}" = gpu ] || [ "${{MACHINE}}" = x ]; }}; then
    LAUNCH=(uv run --extra a python3)
fi
"${{LAUNCH[@]}}" -m {PROGRAM} \\
    "${{DATA[@]}}" actor_rollout_ref.actor.ppo_mini_batch_size=${{mini}} \\
    "${{EXTRA[@]}}" "$@"
"""
SCRIPTS = {
    "if, elif and else": """
if [ "$KIND" = a ]; then N=1; elif [[ $KIND == b* && -z "${NO:-}" ]]; then N=2; else N=3; fi
PPO n=$N
""",
    "case with patterns and falling through": """
case ${KIND:-base_7b} in
    a|b) N=1 ;;
    base_[0-9]*) N=2 ;&
    never) M=5 ;;
    *) N=9 ;;
esac
PPO n=$N m=${M:-none}
""",
    "defaults": """
A=${A:-1}; : "${B:=two words}"; C=${C-3}; D=; E=${D:-4}; F=${D-5}; G=${A:+6}; H=${NOBODY+7}
PPO a=$A "b=$B" c=$C e=$E "f=$F" g=$G "h=$H" i=${X:-${Y:-"${A}_z"}} j=${X:-$((A + 1))}
""",
    "arguments": """
if [ "$#" -lt 2 ]; then echo "Usage: run.sh N PATH"; exit 1; fi
N=$1; shift
while [[ $# -gt 0 ]]; do
    case "$1" in
        --lr) LR="$2"; shift 2 ;;
        --lr=*) LR="${1#*=}"; shift ;;
        *) REST+=("$1"); shift ;;
    esac
done
PPO n=$N lr=$LR "${REST[@]}" count=${#REST[@]}
""",
    "arrays": """
ARGS=( a=1 "b=x y" )
ARGS+=( c=3 )
ARGS[3]=d=4
declare -A SIZE=( [small]=7 [large]=70 )
MORE=(${EMPTY[@]+"${EMPTY[@]}"})
PPO "${ARGS[@]}" first=${ARGS[0]} last=${ARGS[-1]} some="${ARGS[*]:2:2}" size=${SIZE[large]} n=${#ARGS[@]} "${MORE[@]}"
""",
    "texts": """
P=/data/qwen/Qwen3-8B.tar.gz; name=${P##*/}
PPO a=${P%.*} b=${P%%.*} c=${P#*/} d=$name e=${name//-/_} f=${name/Qwen/q} g=${name:0:5} h=${name^^} i=${#name} \\
    j=${name,,} k=$(basename "$P" .gz) l=$(dirname $P) m=${name: -3}
""",
    "sums": """
N=3; ((N++)); M=$((N > 3 ? N * 2 ** 3 : 0)); K=$(( (M - 5) / 4 % 5 )); let L=M+1; H=$((0x10 + 010)); B=$((N & 6 | 1))
PPO n=$N m=$M k=$K l=$L o=$((-7 / 2)) p=$((-7 % 3)) h=$H b=$B c=$((N == 4 && M != 1))
""",
    "functions and loops": """
scale() { local by=${2:-2}; echo $(( $1 * by )); }
set_up() { BATCH=$(scale $1 4); by=outer; }
set_up 8
for name in a b c; do [ $name = b ] && continue; LIST="${LIST:+$LIST,}$name"; done
for ((i = 0; i < 3; i++)); do TOTAL=$((TOTAL + i)); done
for i in {1..3}; do MANY+=(x$i=$i); done
PPO batch=$BATCH list=[$LIST] total=$TOTAL by=$by "${MANY[@]}"
""",
    "the last of several": """
LR=1
(LR=2; export LR)
{ LR=3; }
LR=4 true
false || LR=5
true || LR=6
! false && LR=$LR.5
PPO lr=$LR
LR=7
PPO lr=$LR
""",
    "elements of arrays that begin with a variable": """
K=c; A=(x)
A+=( $K.a=1 # é
    "$K.b=2" ${K}d=3 \\
)
PPO "${A[@]}"
""",
    "comments and continued lines": """
PPO a=1 \\
    b='x#y' \\
    c=3 # d=4 \\
E=5
""",
    "a function starts it": """
train() {
    local n=$1; shift
    PPO n=$n "$@" 2>&1 | tee log.txt
}
if [[ "${NODE_RANK:-0}" -eq 0 ]]; then train 4 a='["console","wandb"]'; else train 8; fi
""",
    "here-documents": """
cat <<EOF > /dev/null
PPO a=0
N=7
EOF
N=1
PPO n=$N
""",
    "what only names the command": """
pkill -f "PPO a=0" || true
pkill -f verl.trainer.main_ppo || true
echo PPO a=0
CMD="PPO a=1 b='2 3'"
eval $CMD
""",
    "variables that are not set, without quotes": """
if [ $NOBODY = x ]; then N=1; else N=2; fi
if [ -n $NOBODY ]; then M=1; fi
if [ ! $NOBODY ]; then K=1; fi
for x in 1 2; do S=$S$x; done
PPO n=$N m=$M k=$K s=$S
""",
    "separators": """
A=(1 2 3); V=a=1,b=2
J=$(IFS=,; echo "${A[*]}")
IFS=,
PPO j=[$J] $V
""",
    "set -e ends it": """
set -e
[ 1 = 2 ]
PPO a=1
""",
    "quotes": r"""
A="a \"b\" \$c \\d"; B='$A'; C=$'x\ty'
PPO a="$A" b="$B" c="$C" d=\"none\" "e=['/x/a', '/x/b']" f="[\"$HOME/x\"]" g=a\ b '+h={a:1}' i=`echo ab` j={}
""",
    "a regular expression": """
MODEL=Qwen3-8B
if [[ $MODEL =~ ([0-9]+)B$ ]]; then SIZE=${BASH_REMATCH[1]}; fi
if [[ ! $MODEL =~ ^llama && ( $MODEL == *8B || $MODEL == *4B ) ]]; then K=1; fi
PPO size=$SIZE k=$K
""",
}


def by_bash(script: Path, folder: Path, environment=None, arguments=()):
    words = words_of_bash(script, folder, environment, arguments)
    return None if words is None else {name: _value(value) for name, value in _assignments(words).items()}


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Writes a script; the environment has nothing that would change it."""
    for name in [name for name in os.environ if name not in ("HOME", "PATH")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> Path:
        path = tmp_path / "run.sh"
        path.write_text(re.sub(r"\bPPO\b", PPO, text))
        return path

    return write


@BASH
@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("environment", [{}, {"KIND": "a", "A": "8"}, {"KIND": "base", "NO": "1", "NODE_RANK": "2"}])
@pytest.mark.parametrize("arguments", [[], ["4", "--lr", "1e-5", "z=1", "--lr=2", "y=a b"]])
def test_a_script_gives_what_bash_gives(script, tmp_path, monkeypatch, name, environment, arguments):
    path = script(SCRIPTS[name])
    expected = by_bash(path, tmp_path, environment, arguments)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    words = " ".join(f"'{argument}'" for argument in arguments)
    if expected is None:
        with pytest.raises(ValueError, match="no command"):
            read_overrides(f"bash {path} {words}")
        return
    found = read_overrides(f"bash {path} {words}")
    assert found.values == expected
    assert not found.unknown


@BASH
@pytest.mark.parametrize(
    "environment", [{}, {"DEVICE": "npu"}, {"MACHINE": "gb200"}, {"DEVICE": "npu", "MACHINE": "old"}]
)
def test_the_branch_of_a_device_is_the_one_that_bash_takes(script, tmp_path, monkeypatch, environment):
    path = script(BY_DEVICE)
    expected = by_bash(path, tmp_path, environment)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    assert overrides(path.read_text()) == expected
    migration = read_verl_command(path)
    is_npu = environment.get("DEVICE") == "npu"
    assert migration.options["prompts_per_step"] == (16 if is_npu else 256)
    assert migration.options["rollout"]["max_completion_tokens"] == (32768 if is_npu else 2048)
    asked = [note for note in migration.notes if "torch_of_nobody" in note]
    assert bool(asked) == ("DEVICE" not in environment)
    assert all("DEVICE=VALUE" in note for note in asked)


def test_variables_and_arguments_may_stand_before_and_after_a_file(script):
    path = script(BY_DEVICE)
    found = overrides(f"DEVICE=npu TRAIN_BATCH_SIZE=4 bash {path} trainer.total_epochs=3")
    assert (found["data.train_batch_size"], found["trainer.total_epochs"]) == (16, 3)
    assert overrides(f"TRAIN_BATCH_SIZE=4 bash {path}")["data.train_batch_size"] == 4


@pytest.mark.parametrize(
    ("text", "option", "name"),
    [
        ("N=$(nvidia-smi -L | wc -l)\nif [ $N -gt 4 ]; then B=8; else B=4; fi\nPPO c=1 b=$B", "b", "N"),
        ("case $(hostname) in node*) B=8 ;; *) B=4 ;; esac\nPPO c=1 b=$B", "b", "$(hostname)"),
        ("HOST=$(hostname)\ncase $HOST in node*) B=8 ;; *) B=4 ;; esac\nPPO c=1 b=$B", "b", "HOST"),
        ("B=4\nif [ -f /some/file ]; then B=8; fi\nPPO c=1 b=$B", "b", "/some/file"),
        ("B=4\nif nvidia-smi > /dev/null; then B=8; fi\nPPO c=1 b=$B", "b", "nvidia-smi"),
        ("B=4\ncommand -v nvcc >/dev/null && B=8\nPPO c=1 b=$B", "b", "nvcc"),
        ("B=${B_OF_NOBODY:?give it}\nPPO c=1 b=$B", "b", "B_OF_NOBODY"),
        ("set -u\nif [ $KIND_OF_NOBODY = x ]; then B=1; else B=2; fi\nPPO c=1 b=$B", "b", "KIND_OF_NOBODY"),
        ("PPO c=1 b=$B_OF_NOBODY", "b", "B_OF_NOBODY"),
        ("PPO c=1 b=$(cat /some/file)", "b", "cat /some/file"),
        ("PPO c=1 b=$((N_OF_NOBODY * 2))", "b", "N_OF_NOBODY"),
        ("ARGS=(c=1)\nif [ -d /x ]; then ARGS+=(b=3); fi\nPPO ${ARGS[@]}", "b", "/x"),
        ("read B\nPPO c=1 b=$B", "b", "B"),
        ("if [ -e /x ]; then PPO c=1 b=2; else PPO c=1 b=3; fi", "b", "/x"),
    ],
)
def test_what_nobody_can_decide_is_reported_by_name(script, text, option, name):
    found = read_overrides(script(text).read_text())
    assert found.values == {"c": 1}
    [(unknown, (_, causes))] = found.unknown.items()
    assert unknown == option
    assert name in " ".join(causes)


def test_a_value_that_is_given_decides(script, monkeypatch):
    text = script("N=$(nvidia-smi -L | wc -l)\nif [ $N -gt 4 ]; then B=8; else B=4; fi\nPPO n=$N b=$B").read_text()
    assert set(read_overrides(text).unknown) == {"n", "b"}
    monkeypatch.setenv("N", "8")
    found = read_overrides(text)
    assert found.values == {"n": 8, "b": 8}
    assert any("N=8" in note for note in found.notes)


def test_a_condition_that_changes_nothing_is_not_reported(script):
    path = script("if [ -d /x ]; then mkdir /x; echo there; fi\ncd /y || exit 1\nPPO a=1")
    assert read_overrides(path.read_text()).unknown == {}


def test_an_option_that_nobody_can_decide_has_the_default_of_verl_and_a_line(script):
    path = script(
        "B=64\nif [ $(nproc) -gt 4 ]; then B=512; fi\nPPO data.train_batch_size=$B data.max_response_length=9"
    )
    migration = read_verl_command(path)
    assert migration.options["prompts_per_step"] == 256
    [each] = [each for each in migration.unsupported if each.option == "data.train_batch_size"]
    assert each.value == "512 or 64"
    assert "$(nproc)" in each.reason
    assert "default of verl" in each.reason


def test_a_variable_that_is_not_set_counts_as_empty_in_a_condition_and_is_named(script):
    found = read_overrides(script('if [ "$KIND_OF_NOBODY" = x ]; then B=1; else B=2; fi\nPPO b=$B').read_text())
    assert found.values == {"b": 2}
    assert any("KIND_OF_NOBODY" in note for note in found.notes)


def test_nothing_of_a_script_is_run(script, tmp_path):
    spoilt = tmp_path / "spoilt"
    path = script(f"touch {spoilt}; echo x > {spoilt}; A=$(touch {spoilt}; echo 1)\neval 'touch {spoilt}'\nPPO b=1")
    assert overrides(path.read_text())["b"] == 1
    assert not spoilt.exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("echo 'give a path'; exit 3\nPPO a=1", r"exit 3.*give a path"),
        ("while true; do :; done\nPPO a=1", "does not end"),
        ("f() { f; }\nf\nPPO a=1", "without end"),
        ("if true; then\nPPO a=1", "line 1.*must end with"),
        ('A="x\nPPO a=1', "line 1.*without closing quote"),
        ("A=$((1 / 0))\nPPO a=1", "divides by 0"),
        ("\n".join(f"[ -f /{n} ] && A{n}=1" for n in range(12)) + "\nPPO a=1", "too many"),
    ],
)
def test_what_cannot_be_read_is_an_error_that_says_where(script, text, words):
    with pytest.raises(ValueError, match=f"(?s){words}"):
        read_overrides(script(text).read_text())


def without_times(values: dict) -> set[str]:
    """The options as texts; `$(date)` was called at another moment."""
    return {re.sub(r"20\d{6}[-_\d]*", "DATE", f"{name}={value}") for name, value in values.items()}


@BASH
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif("QUARTET_VERL" not in os.environ, reason="QUARTET_VERL names no folder of verl's scripts")
@pytest.mark.parametrize("environment", [{}, {"DEVICE": "npu", "INFER_BACKEND": "sglang"}])
def test_every_script_of_verls_gives_what_bash_gives(tmp_path, monkeypatch, environment):
    folder = Path(os.environ["QUARTET_VERL"]).absolute()
    for name in [name for name in os.environ if name not in ("HOME", "PATH")]:
        monkeypatch.delenv(name)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.chdir(tmp_path)
    compared, others = 0, {}
    for path in sorted(folder.rglob("*.sh")):
        expected = by_bash(path, tmp_path, environment)
        if expected is None:
            continue  # another program, or it ends for want of a variable
        found = read_overrides(path.read_text(encoding="utf-8"), path)
        compared += 1
        expected = {name: value for name, value in expected.items() if name not in found.unknown}
        if without_times(found.values) != without_times(expected):
            others[path.name] = without_times(found.values) ^ without_times(expected)
    assert compared
    assert others == {}

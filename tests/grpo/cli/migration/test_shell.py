"""Shell scripts are read as bash runs them. The scripts have the forms of verl's own; bash with stubs is the oracle."""

import os
import re
import shlex
import shutil
import time
from pathlib import Path

import pytest

from grpo.cli.migration.hydra import overrides, value_of
from grpo.cli.migration.verl_command import read_overrides, read_verl_command
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
    *)
        echo "DEVICE must be gpu or npu, got: ${{DEVICE}}" >&2
        exit 1
        ;;
esac
LAUNCH=(python3)
if [ "${{USE_UV:-1}}" != 0 ] && {{ [ "${{DEVICE:-gpu}}" = gpu ] || [ "${{MACHINE}}" = x ]; }}; then
    LAUNCH=(uv run --extra a python3)
fi
"${{LAUNCH[@]}}" -m {PROGRAM} data.train_batch_size=${{batch}} data.max_response_length=${{response}} \\
    actor_rollout_ref.actor.ppo_mini_batch_size=${{mini}} "${{EXTRA[@]}}" "$@"
"""
SCRIPTS = {
    "a program whose end does not matter": """
set -e
nobody_has_this --stop || true
PPO n=1
""",
    "if, elif and else": """
if [ "$KIND" = a ]; then N=1; elif [[ $KIND == b* && -z "${NO:-}" ]]; then N=2; else N=3; fi
PPO n=$N
""",
    "case with patterns": """
case ${KIND:-base_7b} in
    a|b) N=1 ;;
    "base_*") N=2 ;;
    base*7?) N=3 ;;
    *) N=9 ;;
esac
PPO n=$N
""",
    "defaults": """
A=${A:-1}; C=${C-3}; D=; E=${D:-4}; F=${D-5}; G=${A:+6}; H=${NOBODY+7}
PPO a=$A c=$C e=$E "f=$F" g=$G "h=$H" i=${X:-${Y:-"${A}_z"}} j=${X:-$((A + 1))}
""",
    "arguments": """
if [ -z "${2:-}" ]; then echo "Usage: run.sh N PATH"; exit 1; fi
PPO n=$1 "$@" "all=$*"
""",
    "arrays": """
ARGS=( a=1 "b=x y" )
ARGS+=( c=3 )
for x in "${EMPTY[@]}" "" "$NO" "$@"; do ARGS+=("count=$((${#ARGS[@]} + 1))"); done
PPO "${ARGS[@]}" first=${ARGS[0]} "all=${ARGS[*]}" ${ARGS[@]} "${EMPTY[@]}"
""",
    "texts": """
P=/data/qwen/Qwen3-8B.tar.gz; name=Qwen3-8B-Base; S=x; S+=y; P2=~/x
PPO e=${name//-/_} f=${name/Qwen/q} h=${name^^} j=${name,,} k=$(basename "$P" .gz) l=$(dirname $P) s=$S p=$P2
""",
    "sums": """
N=3; M=$((N * 8)); K=$(( (M - 5) / 4 % 5 ))
if ((N < M && K != 9)); then L=1; else L=2; fi
PPO n=$N m=$M k=$K l=$L o=$(((N - 10) / 2)) p=$(((N - 10) % 3)) c=$((N == 4 || M >= 1))
""",
    "the last of several": """
LR=1
{ LR=3; }
X=$(LR=4; echo $LR)
[ 1 = 2 ] || LR=5.$X
[ 1 = 1 ] || LR=6
PPO lr=$LR
LR=7
PPO lr=$LR
""",
    "comments and continued lines": """
PPO a=1 \\
    b='x#y' \\
    c=3 # d=4 \\
E=5
""",
    "functions": """
scale() { echo $(( $1 * 2 )); }
set_up() { BATCH=$(scale $1); }
set_up 8
train() { "$@" n=2 2>&1 | tee log.txt; }
if [[ "${NODE_RANK:-0}" -eq 0 ]]; then train PPO n=$BATCH a='["console","wandb"]'; else train PPO; fi
""",
    "what only names the command": """
cat <<EOF > /dev/null
PPO a=0
EOF
pkill -f "PPO a=0"
pkill -f verl.trainer.main_ppo
echo PPO a=0
CMD="PPO a=1"
$CMD
""",
    "variables that are not set, without quotes": """
N=2
if [ -n $NOBODY ]; then M=1; fi
if [ ! $NOBODY ]; then K=1; fi
S=$S$N
PPO n=$N m=$M k=$K s=$S
""",
    "arguments in a loop": """
MODEL=small; REST=()
while [[ $# -gt 0 ]]; do
    case $1 in
        --lr) LR="$2"; shift 2 ;;
        --lr=*) LR="${1#*=}"; shift ;;
        --flag) FLAG=1; shift ;;
        *) REST+=("$1"); shift ;;
    esac
done
PPO lr=${LR:-1e-6} model=$MODEL flag=${FLAG:-0} count=$# "${REST[@]}"
""",
    "letters as arguments": """
while getopts "l:f" letter; do
    case $letter in l) LR=$OPTARG ;; f) F=1 ;; *) exit 1 ;; esac
done
shift $((OPTIND - 1))
PPO lr=${LR:-1} f=${F:-0} "$@"
""",
    "loops": """
for x in a b c d; do
    [ $x = b ] && continue
    [[ $x == d ]] && break
    ALL+=("$x=1")
done
for ((i = 0; i < 3; i++)); do S+=$i; done
for x in {1..3} {u,v}w; do T=$T$x; done
n=5; until ((n <= 2)); do ((n--)); let m+=2; done
for i in 1 2; do for j in 3 4; do [ $j = 4 ] && continue 2; U=$U$i$j; done; done
PPO "${ALL[@]}" s=$S t=$T n=$n m=$m u=$U
""",
    "a loop that waits, and one that starts it again and again": """
while ! PPO lr=1; do sleep 1; done
for lr in 2 3; do PPO lr=$lr; done
""",
    "a sweep": """
for lr in 1e-6 1e-5; do PPO lr=$lr; done
""",
    "parts of a text": r"""
P=/data/Qwen/Qwen3-8B.tar.gz; A=(x.sh y.sh z.py); N=P
PPO a=${P##*/} b=${P#*/} c=${P%.*} d=${P%%.*} e=${#P} f=${P:6:4} g=${P: -2} h=${P//[A-Z]/_} i=${P/%gz/xz} \
    j=${!N} k=${#A[@]} l=${A[-1]} m="${A[*]:1:1}" n="${A[@]%.sh}" o=${A[1]^} p=${Q:=7}$Q q=$'x\'y' r="${A[@]+${A[0]}}" \
    s="${NONE[@]-empty}" t="${@:1:1}" u=${P/#*Q/R} v=${P:0:-3} w="${!A[@]}" x=${P//\//-} y=${A[2-1]} z=$((${#A[@]} * 2))
""",
    "sums that assign": """
i=3; j=$((i++ + ++i)); k=$(( i > 4 ? i * 2 : -1 )); ((l += 4, l <<= 1)); : $((m = 2 ** 5))
PPO i=$i j=$j k=$k l=$l m=$m n=$((0x10 + 010)) o=$((!i)) p=$((i && 0 || 7 / 2)) q=$((-i % 3)) r=$((~i & 6))
""",
    "variables of a function": """
name=outer; kept=1
inner() { echo "$name-$1-$#"; }
name_it() {
    local name=$1 kept; local -a list=("$@")
    shift
    inner ${#list[@]} "$@"
    [ -z "$1" ] && return 1
    return 0
}
if name_it x y > /dev/null; then A=1; else A=2; fi
name_it x || B=3
PPO a=$A b=$B c=$(name_it p q r) name=$name kept=$kept
""",
    "shells within it": """
A=1; (A=2; cd /; exit 3); B=$(A=4; echo $A); { A=5; } ; C=$(exit 2) || D=$?
(exit 1) && E=1
bash -c 'exit 0' ; time A=6; ! false && F=1
PPO a=$A b=$B c="$C" d=$D f=$F e=${E:-0}
""",
    "bash within it": """
export LR=3; OTHER=4
bash -c "PPO lr=\$LR other=$OTHER"
""",
    "a here-document": """
LR=3
bash <<EOF
N=\$((1 + 1))
PPO lr=$LR n=\$N
EOF
PPO lr=5
""",
    "words that are read": """
read -r A B <<< "one two"; IFS=, read -ra C <<< "x,y,z"; printf -v D '%s_%s' "$A" $B
eval "E=$A; F=\\$B"
set -o nounset; set +u; set -- p=1 "q=2 3"
PPO a=$A b=$B c=${C[1]} d=$D e=$E f=$F "$@"
""",
    "tests": """
[ 1 = 1 -a -n "$NOBODY" -o x = x ] && A=1
[[ (a == b || a < b) && abc == [a-c]*[^x] && run_12 =~ ^run_([0-9]+)$ ]] && B=${BASH_REMATCH[1]}
[[ -v A && ! -v NOBODY ]] && C=1
[ few -gt 1 ] || D=1
[[ "$-" == *i* ]] || E=1
declare -i F=2; readonly G=3; typeset H=4
PPO a=$A b=$B c=$C d=$D e=$E f=$F g=$G h=$H
""",
    "what it is not told": """
if [ -d /no/such/folder ]; then echo cached; else mkdir -p /no/such; fi
[ -f /no/such/file.sh ] && source /no/such/file.sh
case "$(uname_of_nobody)" in Linux) echo ok ;; esac
command -v nvcc_of_nobody > /dev/null || export CUDA_OF_NOBODY=1
download() { [ -e /no/such/file ] || echo get; }
download
for file in /no/such/*.txt; do echo $file; done
PPO a=1
""",
    "an end that nobody can foretell": """
if [ ! -d / ]; then echo "no files" >&2; exit 1; fi
cd / || exit 1
PPO a=1
""",
    "arrays by names": """
declare -A RATES=([small]=1e-5 ["a large one"]=1e-6) NONE
RATES[mid]=2e-6; KIND=${KIND:-small}; RATES[mid]+=1
key="a large one"
for name in "${!RATES[@]}"; do count=$((count + 1)); done
PPO lr=${RATES[${KIND:-small}]:-0} large=${RATES[$key]} mid=${RATES[mid]} n=${#RATES[@]} count=$count none=${#NONE[@]}
""",
    "a file of python": """
python3 -u verl/trainer/main_ppo.py a=1 "$@"
""",
    "a node that waits": """
while true; do
    if ! all_nodes_of_nobody; then
        sleep 1
    else
        PPO a=1
        break
    fi
done
""",
    "exec": """
exec PPO a=1 "$@"
PPO a=2
""",
    "set -e ends it": """
set -e
[ 1 = 2 ]
PPO a=1
""",
    "quotes": r"""
A="a \"b\" \$c \\d"; B='$A'
PPO a="$A" b="$B" d=\"none\" "e=['/x/a', '/x/b']" f="[\"$HOME/x\"]" g=a\ b '+h={a:1}' i=`echo ab` j={}
""",
}


def by_bash(script: Path, folder: Path, environment=None, arguments=()):
    words = words_of_bash(script, folder, environment, arguments)
    return None if words is None else {each.name: value_of(each.text) for each in overrides(words)}


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
    assert read_overrides(path.read_text()).values == expected
    migration = read_verl_command(path)
    is_npu = environment.get("DEVICE") == "npu"
    assert migration.options["prompts_per_step"] == (16 if is_npu else 256)
    assert migration.options["rollout"]["max_completion_tokens"] == (32768 if is_npu else 2048)
    asked = [note for note in migration.notes if "torch_of_nobody" in note]
    assert bool(asked) == ("DEVICE" not in environment)
    assert all("DEVICE=VALUE" in note for note in asked)


def test_variables_and_arguments_may_stand_before_and_after_a_file(script):
    path = script(BY_DEVICE)
    found = read_overrides(f"DEVICE=npu TRAIN_BATCH_SIZE=4 bash {path} trainer.total_epochs=3").values
    assert (found["data.train_batch_size"], found["trainer.total_epochs"]) == (16, 3)
    assert read_overrides(f"TRAIN_BATCH_SIZE=4 bash {path}").values["data.train_batch_size"] == 4


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("PPO c=1 b=$B_OF_NOBODY", "B_OF_NOBODY"),
        ("B=${B_OF_NOBODY:?give it}\nPPO c=1 b=$B", "B_OF_NOBODY"),
        ("PPO c=1 b=$(cat /some/file)", "cat /some/file"),
        ("PPO c=1 b=$((N_OF_NOBODY * 2))", "N_OF_NOBODY"),
        ("N=$(nvidia-smi -L | wc -l)\nPPO c=1 b=$N", "N"),
        ("N=$(command -v nvcc > /dev/null && echo 1 || echo 2)\nPPO c=1 b=$N", "N"),
    ],
)
def test_a_value_that_nobody_knows_is_reported_by_name(script, text, name):
    found = read_overrides(script(text).read_text())
    assert found.values == {"c": 1}
    [(unknown, (_, causes))] = found.unknown.items()
    assert unknown == "b"
    assert name in " ".join(causes)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("N=$(nproc)\nif [ $N -gt 4 ]; then B=8; fi", "N=VALUE"),
        ("set -u\nif [ $KIND_OF_NOBODY = x ]; then B=1; fi", "KIND_OF_NOBODY=VALUE"),
        ('source /env.sh\nif [ -n "$KIND_OF_NOBODY" ]; then B=1; fi', "KIND_OF_NOBODY=VALUE"),
        ("N=$(nproc)\n((N > 4)) && B=1", "N=VALUE"),
        ("\ncase $(hostname) in node*) B=8 ;; esac", r"\$\(hostname\)"),
        ("\nif [ -f /some/file ]; then B=8; fi", "-f /some/file"),
        ("\nif [[ 1 = 1 && -d /x ]]; then B=8; fi", "-d /x"),
        ("\ncommand -v nvcc >/dev/null && B=8", "command -v nvcc"),
        ("A=x\n[[ $A -gt 4 ]] && B=8", "x -gt 4"),
        ("A=x\n[[ $A =~ [[:alpha:]] ]] && B=8", "x =~"),
        ("\n[[ x == *$B_OF_NOBODY ]] && B=8", "B_OF_NOBODY=VALUE"),
    ],
)
def test_a_condition_that_nobody_can_decide_is_refused_by_name(script, text, name):
    with pytest.raises(ValueError, match=rf"(?s)line 2 .*{name}.*paste the words from `python3 -m verl"):
        read_overrides(script(f"{text}\nPPO b=$B").read_text())


REFUSED = r"""
f() { f; }; f | case a in a) B=1 ;& esac | select x in a; do :; done | coproc cat | while :; do :; done
export -n | LR=1 set -e | unset B[0] | pushd / | shift x | getopts a
C[7]=x | B=([x]=1) | C[x]=1 | B=${C[x]} | B=${C[@]:?}
IFS=, | read B <<< "a b" | read B C <<< "a b c"
[ a b c d ] | [[ a == [[:alpha:]] ]]
B=${A@Q} | B=$'\x41' | B=${A/$NOBODY/x} | B=$((A++)) | B=${A:$NOBODY}
echo {a,$A}
ssh host "PPO a=1"
"""


@pytest.mark.parametrize("line", re.split(r"\n| \| ", REFUSED.strip()))
def test_what_is_not_read_is_refused_with_its_line(script, line):
    with pytest.raises(ValueError, match=r"line 2 of the shell text: .* is not read; .*paste the words"):
        read_overrides(script(f"A=ab; C=(a b)\n{line}\nPPO b=$B").read_text())


def test_a_file_that_is_sourced_is_read_and_one_that_is_elsewhere_noted(script, tmp_path):
    path = script("source env.sh\nPPO a=${LR:-2}")
    found = read_overrides(path.read_text())
    assert found.values == {"a": 2}
    assert any("source env.sh" in note for note in found.notes)
    (tmp_path / "env.sh").write_text('[ -n "$1" ] && return\nLR=1\n')
    assert read_overrides(path.read_text()).values == by_bash(path, tmp_path) == {"a": 1}
    path = script("LR=3\nsource ./env.sh x\nPPO a=${LR:-2} count=$#")
    assert read_overrides(path.read_text()).values == by_bash(path, tmp_path) == {"a": 3, "count": 0}


def test_what_a_sourced_file_sets_is_unknown_if_it_cannot_be_read(script, tmp_path):
    (tmp_path / "env.sh").write_text("pushd /tmp\nif true; then LR=1; fi\n")
    found = read_overrides(script("LR=3; N=4\n. ./env.sh\nPPO a=$LR n=$N").read_text())
    assert found.values == {"n": 4}
    assert found.unknown["a"][1] == ["LR"]
    assert any("env.sh" in note and "pushd" in note for note in found.notes)


def test_a_value_that_is_given_decides(script, monkeypatch):
    text = script("N=$(nvidia-smi -L | wc -l)\nif [ $N -gt 4 ]; then B=8; else B=4; fi\nPPO n=$N b=$B").read_text()
    monkeypatch.setenv("N", "8")
    found = read_overrides(text)
    assert found.values == {"n": 8, "b": 8}
    assert any("N=8" in note for note in found.notes)


def test_a_module_that_is_asked_for_may_be_answered_by_hand(script, monkeypatch):
    text = script("D=$(python3 -c 'import torch_of_nobody' && echo npu || echo gpu)\nPPO d=$D").read_text()
    assert read_overrides(text).values == {"d": "gpu"}
    monkeypatch.setenv("D", "npu")
    assert read_overrides(text).values == {"d": "npu"}


def test_an_option_that_nobody_can_decide_has_the_default_of_verl_and_a_line(script):
    migration = read_verl_command(script("PPO data.train_batch_size=$(nproc) data.max_response_length=9"))
    assert migration.options["prompts_per_step"] == 256
    [each] = [each for each in migration.unsupported if each.option == "data.train_batch_size"]
    assert each.value == "$(nproc)"
    assert "default of verl" in each.reason


def test_a_variable_that_is_not_set_counts_as_empty_in_a_condition_and_is_named(script):
    found = read_overrides(script('if [ "$KIND_OF_NOBODY" = x ]; then B=1; else B=2; fi\nPPO b=$B').read_text())
    assert found.values == {"b": 2}
    assert any("KIND_OF_NOBODY" in note for note in found.notes)


@pytest.mark.parametrize(
    "attack",
    [
        "x=a\n" + "x=$x$x\n" * 40,
        "x=(a)\n" + 'x+=("${x[@]}")\n' * 40,
        "x=a\nfor i in {1..40}; do x=$x$x; done",
        "for i in {1..1000}; do for j in {1..1000}; do for k in {1..1000}; do x=1; done; done; done",
        "f0() { :; }\n" + "".join(f"f{n}() {{ f{n - 1}; f{n - 1}; }}\n" for n in range(1, 40)) + "f39",
        "x={1..9999}{1..9999}; y=({1..9999}{1..9999})",
        "x=({1..9999}$y{1..9999})",
        "x=" + "ab" * 5000 + "; y=${x//b*c/}",
        "x=" + "ab" * 5000 + "; y=${x%%b*c}",
        "echo " + "$(" * 400 + "echo" + ")" * 400,
    ],
)
def test_a_script_that_hardly_ends_or_fills_the_memory_is_refused_soon(attack):
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"hardly ends|too deeply|is not read.*paste the words"):
        read_overrides(f"{attack}\n{PPO} a=1")
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("source", ["source SELF; source SELF", "bash SELF; bash SELF"])
def test_a_file_that_reads_itself_twice_is_refused_soon(tmp_path, source):
    path = tmp_path / "self.sh"
    path.write_text(source.replace("SELF", str(path)))
    with pytest.raises(ValueError, match="hardly ends|without end"):
        read_overrides(f"bash {path}\n{PPO} a=1")


@pytest.mark.parametrize("expression", ["^(a+)+b$", "a*a*a*a*a*a*a*a*a*a*b", "(a|a)*b"])
def test_an_expression_that_python_might_never_end_is_not_tried(expression):
    text = f"x={'a' * 60}\n[[ $x =~ {expression} ]] && y=1\n{PPO} a=1"
    assert read_overrides(text).values == {"a": 1}
    with pytest.raises(ValueError, match=r"cannot be decided.*depends on it"):
        read_overrides(f"{text} b=$y")


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("2**63", -(2**63)),
        ("9**9**9", -2123029214124047543),
        ("1<<65", 2),
        ("1<<-1", -(2**63)),
        ("-8>>65", -4),
        ("9223372036854775807+1", -(2**63)),
    ],
)
def test_sums_have_64_bits_as_in_bash(expression, value):
    assert read_overrides(f"{PPO} a=$(({expression}))").values == {"a": value}


@pytest.mark.parametrize("attack", ["read -r k <FILE", "mapfile -t k <FILE", "k=$(<FILE)", "k=$(cat FILE)"])
@pytest.mark.parametrize("how", ["ATTACK", "eval 'ATTACK'"])
def test_no_file_or_environment_of_a_process_gets_into_an_option(tmp_path, attack, how):
    (tmp_path / "key").write_text("hidden")
    text = how.replace("ATTACK", attack.replace("FILE", str(tmp_path / "key")))
    assert "hidden" not in str(read_overrides(f"{text}\n{PPO} a=$k").values)


def test_nothing_of_a_script_is_run(script, tmp_path):
    spoilt = tmp_path / "spoilt"
    path = script(f"touch {spoilt}; echo x > {spoilt}; A=$(touch {spoilt}; echo 1)\nPPO b=1")
    assert read_overrides(path.read_text()).values == {"b": 1}
    assert not spoilt.exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("echo 'give a path'; exit 3\nPPO a=1", r"exit 3.*give a path"),
        ("if true; then\nPPO a=1", "line 1.*must end with"),
        ('A="x\nPPO a=1', "line 1.*without closing quote"),
        ("A=(x$i=1)\nPPO a=1", "line 1.*must be words"),
        ("A=$((1 / 0))\nPPO a=1", "divides by 0"),
    ],
)
def test_what_cannot_be_read_is_an_error_that_says_where(script, text, words):
    with pytest.raises(ValueError, match=f"(?s){words}"):
        read_overrides(script(text).read_text())


WHOLE = Path(__file__).parents[3] / "cases/verl_scripts"
CASES = [
    ("arguments.sh", {}, []),
    (
        "arguments.sh",
        {"GROUP": "4"},
        ["--nodes", "2", "--model=/m/Qwen3-8B", "--run", "seed=1", "data.seed=3", "a=b c"],
    ),
    ("arguments.sh", {}, ["-m", "X", "--", "--odd", "data.seed=3"]),
    ("arguments.sh", {}, ["--help"]),
    ("arguments.sh", {}, ["--run", "nothing"]),
    ("dapo.sh", {}, []),
    ("dapo.sh", {"RAY_DATA_HOME": "/data", "MODEL_PATH": "x y"}, []),
    ("nodes.sh", {}, []),
    ("nodes.sh", {"GPUS": "4", "NNODES": "1", "WORK_DIR": "/tmp"}, ["trainer.total_epochs=2"]),
    ("settings.sh", {}, []),
    ("settings.sh", {"SIZE": "large", "BONUS": "0.5", "DEBUG": "1"}, ["trainer.total_epochs=2"]),
    ("settings.sh", {"SIZE": "huge"}, []),
    ("sweep.sh", {}, []),
    ("sweep.sh", {"LENGTHS": "7 8 9"}, ["data.seed=3"]),
]


@BASH
@pytest.mark.parametrize(("name", "environment", "arguments"), CASES)
def test_a_whole_script_gives_the_options_that_bash_gives(script, tmp_path, monkeypatch, name, environment, arguments):
    """All options as bash has them, and the same configuration as of the words that bash gives."""
    path = WHOLE / name
    words = words_of_bash(path, tmp_path, environment, arguments)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    command = shlex.join(["bash", str(path), *arguments])
    if words is None:
        with pytest.raises(ValueError, match="there is no command"):
            read_overrides(command)
        return
    found = read_overrides(command)
    assert not found.unknown
    migration, expected = read_verl_command(command), read_verl_command(shlex.join([*PPO.split(), *words]))
    assert migration.tree == expected.tree
    assert migration.unsupported == expected.unsupported
    assert found.values == read_overrides(shlex.join([*PPO.split(), *words])).values
    again = [note for note in found.notes if "starts it again" in note]
    assert len(again) == (name == "sweep.sh")


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
    compared, refused, others = 0, [], {}
    for path in sorted(folder.rglob("*.sh")):
        expected = by_bash(path, tmp_path, environment)
        if expected is None:
            continue  # another program, or it ends for want of a variable
        compared += 1
        try:
            found = read_overrides(path.read_text(encoding="utf-8"), path)
        except ValueError as error:
            refused.append(f"{path.name}: {error}")
            continue
        expected = {name: value for name, value in expected.items() if name not in found.unknown}
        if without_times(found.values) != without_times(expected):
            others[path.name] = without_times(found.values) ^ without_times(expected)
    assert others == {}
    assert len(refused) <= compared / 20, refused

#!/usr/bin/env bash
# The whole recipe: SFT, draft head, GRPO, each followed by its evaluation on the whole test set. Stop it whenever you
# like and start it again: what is done is skipped, a training that was under way goes on from its newest checkpoint.
set -euo pipefail
here=$(dirname "$0")
runs=runs/gsm8k
options=("$@") # for every command, such as: --threads 2

evaluate() { # NAME MODEL
  [ -f "$runs/eval_$1.json" ] && return
  rm -rf "$runs/eval_$1" # of an evaluation that was stopped: it begins again
  quartet eval "$2" --data.name gsm8k --eval.split test --dtype bfloat16 --rollout.temperature 0.7 \
    --eval.samples "${SAMPLES:-8}" --rollout.max_completion_tokens 200 \
    --output "$runs/eval_$1" --json "$runs/eval_$1.json" "${options[@]}"
}

stage() { # NUMBER NAME COMMAND
  [ -d "$runs/$2/policy" ] || quartet "$3" "$here/$1_$2.yaml" --resume auto "${options[@]}"
}

stage 1 sft sft
evaluate sft "$runs/sft"
stage 2 mtp mtp
stage 3 grpo train
evaluate grpo "$runs/grpo"
quartet report "$runs/grpo"
python "$here/table.py" "$runs"

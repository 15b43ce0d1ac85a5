#!/usr/bin/env bash
# The learning curve of the GRPO run: its start and every checkpoint, evaluated on the easiest test questions after the
# run, so that nothing was chosen by it. Stop it and start it again as run.sh, which comes first.
set -euo pipefail
here=$(dirname "$0")
run=runs/gsm8k/grpo
curve=runs/gsm8k/curve
options=("$@") # for every command, such as: --threads 2

mkdir -p "$curve"
[ -f "$curve/easiest.jsonl" ] || python "$here/table.py" --easiest "$curve/easiest.jsonl"

point() { # STEP MODEL
  [ -f "$curve/step_$1.json" ] && return
  rm -rf "$curve/step_$1" # of an evaluation that was stopped: it begins again
  quartet eval "$2" --data.name "$curve/easiest.jsonl" --dtype bfloat16 --rollout.temperature 0.7 \
    --eval.samples "${SAMPLES:-8}" --rollout.max_completion_tokens 200 --rollout.draft_tokens 0 \
    --output "$curve/step_$1" --json "$curve/step_$1.json" "${options[@]}"
}

point 000000 runs/gsm8k/mtp
for checkpoint in "$run"/checkpoints/step_*; do
  step=${checkpoint##*step_}
  [ -d "$curve/policy_$step" ] || quartet export "$checkpoint" "$curve/policy_$step"
  point "$step" "$curve/policy_$step"
done
python "$here/learning_curve.py" "$curve"
quartet report "$curve"

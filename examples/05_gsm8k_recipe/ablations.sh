#!/usr/bin/env bash
# What the parts of the recipe are worth, each arm on the same small budget: supervised arms on the same solutions in
# the same order, GRPO arms on the same number of steps from the policy of stage 2 (run.sh comes first). Stop it
# and start it again as run.sh.
set -euo pipefail
here=$(dirname "$0")
runs=runs/ablations
sft_steps=${SFT_STEPS:-24}
grpo_steps=${GRPO_STEPS:-20}
samples=${SAMPLES:-4}
exact=models/smollm2-135m-mla
dense=models/smollm2-135m-instruct
options=("$@") # for every command, such as: --threads 2

mkdir -p "$runs"
[ -f "$runs/easiest.jsonl" ] || python "$here/table.py" --easiest "$runs/easiest.jsonl"
[ -d "$runs/moe" ] || quartet convert "$dense" "$runs/moe" --ffn moe
[ -d "$runs/with_head" ] || quartet convert "$dense" "$runs/with_head" --mtp

evaluate() { # NAME SAMPLES
  [ -f "$runs/eval_$1.json" ] && return
  rm -rf "$runs/eval_$1" # of an evaluation that was stopped: it begins again
  quartet eval "$runs/$1" --data.name "$runs/easiest.jsonl" --dtype bfloat16 --rollout.temperature 0.7 --eval.samples "$2" \
    --rollout.max_completion_tokens 200 --rollout.draft_tokens 0 --rollout.prompts_per_shard 64 \
    --output "$runs/eval_$1" --json "$runs/eval_$1.json" "${options[@]}"
}

sft() { # NAME MODEL [OPTION ...]
  [ -d "$runs/$1/policy" ] || quartet sft "$here/1_sft.yaml" --model "$2" --output_dir "$runs/$1" --resume auto \
    --steps "$sft_steps" --learner.warmup_steps 4 --checkpoint.every "$sft_steps" "${@:3}" "${options[@]}"
  evaluate "$1" 0
}

grpo() { # NAME [OPTION ...]
  [ -d "$runs/$1/policy" ] || quartet train "$here/3_grpo.yaml" --output_dir "$runs/$1" --resume auto \
    --steps "$grpo_steps" --checkpoint.every "$grpo_steps" "${@:2}" "${options[@]}"
  evaluate "$1" "$samples"
}

sft sft_full "$exact"
sft sft_dense "$dense"
sft sft_moe "$runs/moe" --balance.bias_rate 0.001
sft sft_mtp_in_trunk "$runs/with_head" --mtp.train_base_model true --mtp.loss_weight 0.3 --mtp.depth 1

# The first steps of the recipe's own run are the arm to compare with.
[ -d "$runs/grpo_full" ] || quartet export "runs/gsm8k/grpo/checkpoints/step_$(printf %06d "$grpo_steps")" "$runs/grpo_full"
evaluate grpo_full "$samples"
grpo grpo_lora --lora.rank 16 --learner.learning_rate 3.0e-4
grpo grpo_no_curriculum --curriculum.shortest_share 1

python "$here/ablations.py" "$runs"

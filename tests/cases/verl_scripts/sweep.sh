#!/bin/bash
# Several commands: a sweep of two rates by a function, then a second stage from the first one's weights.
train() {
    local name="$1" lr="$2"
    shift 2
    echo "+ python3 -m verl.trainer.main_ppo $name"
    CMD=(python3 -m verl.trainer.main_ppo "algorithm.adv_estimator=grpo" "actor_rollout_ref.rollout.n=8")
    CMD+=("trainer.experiment_name=$name" actor_rollout_ref.actor.optim.lr="$lr" "$@")
    if ! "${CMD[@]}"; then
        echo "$name failed"
        return 1
    fi
}
LENGTHS=(${LENGTHS:-1024 4096})
for lr in 1e-6 5e-6; do
    train "stage1_lr${lr//-/m}" $lr data.max_response_length=${LENGTHS[0]} "$@" || continue
done
eval "train stage2 1e-6 data.max_response_length=${LENGTHS[1]} \
    actor_rollout_ref.model.path=checkpoints/stage1"

#!/usr/bin/env bash
# A file of settings beside it, functions, files that may be there or not, and options in lists.
set -eu
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" &>/dev/null && pwd)"
source "$HERE/settings.env" || exit 1

log() { printf '%s\n' "$*" >&2; }
fetch() {
    local folder=$1 name
    name=${2:-data}
    if [ ! -d "$folder" ]; then
        log "fetching $name"
        huggingface-cli_of_nobody download "$name" --local-dir "$folder" || { log "no $name"; exit 1; }
    fi
}
join() { local IFS_BEFORE="$1" text="" each; shift; for each in "$@"; do text+="${text:+$IFS_BEFORE}'$each'"; done; echo "$text"; }

fetch /no/such/folder/data openai/gsm8k
FILES=$(join ", " /data/a/train.parquet "/data/b c/train.parquet")
REWARD=(reward.custom_reward_function.path="$HERE/reward.py")
if [[ -n "${BONUS:-}" ]]; then
    REWARD+=(+reward.custom_reward_function.reward_kwargs.bonus="$BONUS")
fi
if [ "${DEBUG:-0}" = 1 ]; then
    set -x
    LIMITS="data.train_max_samples=64 trainer.total_training_steps=2"
fi
trap 'log ended' EXIT

log "verl.trainer.main_ppo begins at $(date)"
time python3 -m verl.trainer.main_ppo \
    algorithm.adv_estimator=grpo data.train_files="[$FILES]" \
    data.train_batch_size=$BATCH actor_rollout_ref.actor.ppo_mini_batch_size=$((BATCH > 256 ? 256 : BATCH)) \
    actor_rollout_ref.model.path=$MODEL_NAME actor_rollout_ref.rollout.n=5 \
    "${OPTIMIZER[@]}" "${REWARD[@]}" ${LIMITS:-} \
    trainer.default_local_dir='checkpoints/${trainer.project_name}/now' "$@" 2>&1 | tee "log_$(date +%s).txt"
log ended

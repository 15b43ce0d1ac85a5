#!/bin/bash
# Options of its own before those of verl, as projects on top of verl have them.
set -euo pipefail

usage() {
    cat <<EOF
Usage: $(basename "$0") [--model PATH] [--nodes N] [--run NAME=VALUE]... [-- KEY=VALUE...]
EOF
    exit "${1:-0}"
}

MODEL="models/small"
NODES=1
declare -A EXTRA=()
while (($#)); do
    case "$1" in
        -m | --model) MODEL="${2:?a path}"; shift 2 ;;
        --model=*) MODEL="${1#--model=}"; shift ;;
        --nodes) NODES=$2; shift 2 ;;
        --run)
            [[ "$2" =~ ^([a-z_]+)=(.*)$ ]] || usage 2
            EXTRA["${BASH_REMATCH[1]}"]="${BASH_REMATCH[2]}"
            shift 2
            ;;
        -h | --help) usage ;;
        --) shift; break ;;
        *=*) break ;;
        *) usage 2 >&2 ;;
    esac
done

name=$(basename "$MODEL")
name=${name,,}
ARGS=()
for key in "${!EXTRA[@]}"; do ARGS+=("trainer.$key=${EXTRA[$key]}"); done

python3 -m verl.trainer.main_ppo \
    algorithm.adv_estimator=grpo \
    data.train_batch_size=$((NODES * 64)) \
    actor_rollout_ref.model.path="$MODEL" \
    actor_rollout_ref.actor.ppo_mini_batch_size=$((NODES * 64 / 4)) \
    actor_rollout_ref.rollout.n=${GROUP:-8} \
    trainer.nnodes="$NODES" \
    trainer.experiment_name="${name%%-*}_$((NODES * 8))gpus" \
    ${ARGS[@]+"${ARGS[@]}"} \
    "$@"

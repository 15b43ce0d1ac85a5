#!/bin/bash
#SBATCH --nodes=2
# A cluster: names of nodes from a program, workers in a loop, a loop that waits, and a command in a text.
set -x
[ -f /etc/profile.d/cluster_of_nobody.sh ] && source /etc/profile.d/cluster_of_nobody.sh
ulimit -c 0
nodes=$(scontrol_of_nobody show hostnames "$SLURM_JOB_NODELIST_OF_NOBODY")
nodes_array=($nodes)
head_node=${nodes_array[0]}
head_node_ip=$(srun_of_nobody --nodes=1 -w "$head_node" hostname --ip-address)
if [[ "$head_node_ip" == *" "* ]]; then
    IFS=' ' read -ra ADDR <<<"$head_node_ip"
    head_node_ip=${ADDR[0]}
fi
port=6379
ip_head=$head_node_ip:$port
export ip_head
GPUS=${GPUS:-8}
NNODES=${NNODES:-2}
printenv_of_nobody

srun_of_nobody -w "$head_node" ray start --head --port=$port --num-gpus "$GPUS" --block &
sleep 10
worker_num=$((NNODES - 1))
for ((i = 1; i <= worker_num; i++)); do
    node_i=${nodes_array[$i]}
    srun_of_nobody -w "$node_i" ray start --address "$ip_head" --num-gpus "$GPUS" --block &
    sleep 5
done
if command -v nvidia_smi_of_nobody >/dev/null 2>&1; then export HAS_GPU=1; fi
tries=0
until ray_status_of_nobody; do
    tries=$((tries + 1))
    [ $tries -gt 20 ] && { echo "no cluster" >&2; exit 1; }
    sleep 5
done

batch=$((GPUS * NNODES * 8))
while true; do
    if ready_of_nobody "$NNODES"; then
        PYTHONUNBUFFERED=1 bash -c "cd ${WORK_DIR:-/} && python3 -u -m verl.trainer.main_ppo \
            model_engine=megatron \
            algorithm.adv_estimator=rloo \
            data.train_batch_size=$batch \
            data.seed=\$((40 + 2)) \
            actor_rollout_ref.actor.ppo_mini_batch_size=$batch \
            actor_rollout_ref.actor.optim.lr_decay_style=cosine \
            actor_rollout_ref.rollout.n=4 \
            'actor_rollout_ref.rollout.val_kwargs={n:2,temperature:0.6}' \
            trainer.n_gpus_per_node=$GPUS trainer.nnodes=$NNODES $*"
        break
    fi
    sleep 5
done

#!/usr/bin/env bash
# GRPO on verl: recipes/verl/run.sh EXPORT MODEL [verl overrides ...]
# EXPORT: the folder "export" that `ibisagent data build` wrote, with format "verl". MODEL: the SFT start.
# For more machines start Ray on them first (https://docs.ray.io) and add trainer.nnodes=N.
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "usage: $0 EXPORT MODEL [overrides, such as trainer.n_gpus_per_node=4]" >&2
    exit 2
fi
here=$(cd "$(dirname "$0")" && pwd)
export=$(cd "$1" && pwd)
model=$2
shift 2

files() { # the Parquet files of one split, as a list for hydra
    local found=("$export"/verl/"$1"-*.parquet)
    if [ ! -e "${found[0]}" ]; then
        echo "$export/verl: holds no $1-*.parquet; run 'ibisagent data build' with the format verl" >&2
        exit 2
    fi
    local IFS=,
    echo "[${found[*]}]"
}
train=$(files train)
val=$(files "${VAL_SPLIT:-val}")

exec "${PYTHON:-python3}" -m verl.trainer.main_ppo --config-path "$here" --config-name grpo \
    data.train_files="$train" \
    data.val_files="$val" \
    actor_rollout_ref.model.path="$model" \
    actor_rollout_ref.rollout.agent.agent_loop_config_path="${AGENT_LOOP:-$here/agent_loop.yaml}" \
    "$@"

#!/usr/bin/env bash
# Trains on GPU nodes of a SLURM cluster, with one process for each GPU.
#
#   launch/slurm.sh --nodes=2 --gpus_per_node=8 --time=24:00:00 --workdir=DIR --data_dir=DIR [flags] \
#     -- --config=configs/lf_amazon_1.3m.py [--config.train.epochs=30 ...]
#
# Submits slurm.sbatch, which saves a checkpoint and requeues itself before its time limit until training has finished.
#
# Flags (--name=value; except for switches, the default is the environment variable VIXML_NAME). sbatch reads other
# options from the environment: SBATCH_QOS, SBATCH_CONSTRAINT, SBATCH_EXCLUSIVE, ...
#   --nodes, --gpus_per_node   number of nodes, and of GPUs of each; by default 1 and 8
#   --time            time limit of one job, such as 24:00:00
#   --workdir         workdir of the run, on a file system that all nodes see
#   --data_dir        folder of prepared data sets, on a file system that all nodes see
#   --python          Python with vixml_jax and jax[cuda12], on such a file system; by default .venv/bin/python of the
#                     repository
#   --partition, --account, --job_name   passed to sbatch
#   --cpus_per_gpu    CPU cores for each GPU; by default 8
#   --save_seconds    seconds before the time limit at which the run saves a checkpoint; by default 300
#   --max_restarts    maximum number of times that the job requeues itself; by default 20
#   --max_hours       stop training for good after so many hours from now, time in the queue included; by default never
#   --dry-run         print the command, and the batch script as comments, without submitting it

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

nodes=${VIXML_NODES:-1} gpus_per_node=${VIXML_GPUS_PER_NODE:-8} cpus_per_gpu=${VIXML_CPUS_PER_GPU:-8}
time=${VIXML_TIME:-} workdir=${VIXML_WORKDIR:-} data_dir=${VIXML_DATA_DIR:-}
python=${VIXML_PYTHON:-$root/.venv/bin/python}
partition=${VIXML_PARTITION:-} account=${VIXML_ACCOUNT:-} job_name=${VIXML_JOB_NAME:-vixml}
save_seconds=${VIXML_SAVE_SECONDS:-300} max_restarts=${VIXML_MAX_RESTARTS:-20}
max_hours=${VIXML_MAX_HOURS:-}
value_flags="nodes gpus_per_node cpus_per_gpu time workdir data_dir python partition account job_name save_seconds
  max_restarts max_hours"

main() {
  parse_flags "${value_flags//$'\n'/ }" "dry_run" "$@"
  need time workdir data_dir
  need_number nodes gpus_per_node cpus_per_gpu save_seconds max_restarts
  need_decimal max_hours
  need_config
  # TERM@ and not B:TERM@: the signal must reach the training processes. The batch shell could forward it only through
  # srun, which kills its tasks at once when it receives SIGTERM.
  local command=(
    sbatch --job-name="$job_name" --nodes="$nodes" --ntasks-per-node="$gpus_per_node" --gpus-per-node="$gpus_per_node"
    --cpus-per-task="$cpus_per_gpu" --time="$time" --signal="TERM@$save_seconds" --requeue --open-mode=append
    --chdir="$root" --output="$workdir/slurm-%j.log")
  [[ -z $partition ]] || command+=(--partition="$partition")
  [[ -z $account ]] || command+=(--account="$account")
  execute mkdir -p "$workdir"  # sbatch does not create the folder of its log.
  execute "${command[@]}" "$root/launch/slurm.sbatch" "$python" "$workdir" "$max_restarts" \
    "$(later "$max_hours")" "${arguments[@]}" "--config.dataset.data_dir=$data_dir"
  if [[ $dry_run == true ]]; then
    sed 's/^/# /' "$root/launch/slurm.sbatch"
  fi
}

main "$@"

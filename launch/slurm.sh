#!/usr/bin/env bash
# Trains on GPU nodes of a SLURM cluster, one process a GPU.
#
#   launch/slurm.sh --nodes=2 --gpus_per_node=8 --time=24:00:00 --workdir=DIR --data_dir=DIR [flags] \
#     -- --config=configs/lf_amazon_1.3m.py [--config.train.epochs=30 ...]
#
# Submits slurm.sbatch, which saves and requeues itself before its time is over, until training has finished.
#
# Flags (--name=value; the environment's VIXML_NAME is the default of each but switches). What is not here, sbatch reads
# from the environment: SBATCH_QOS, SBATCH_CONSTRAINT, SBATCH_EXCLUSIVE, ...
#   --nodes, --gpus_per_node   how many; by default 1 and 8
#   --time            of one job, as 24:00:00
#   --workdir         of the run, on a file system that all nodes see
#   --data_dir        prepared data sets, likewise
#   --python          with vixml_jax and jax[cuda12], likewise; by default .venv/bin/python of this folder
#   --partition, --account, --job_name   sbatch's
#   --cpus_per_gpu    by default 8
#   --save_seconds    before the end of a job, in which to save; by default 300
#   --max_restarts    most times that the job requeues itself, by default 20
#   --dry-run         print the command, and the script as comments; submit nothing

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

nodes=${VIXML_NODES:-1} gpus_per_node=${VIXML_GPUS_PER_NODE:-8} cpus_per_gpu=${VIXML_CPUS_PER_GPU:-8}
time=${VIXML_TIME:-} workdir=${VIXML_WORKDIR:-} data_dir=${VIXML_DATA_DIR:-}
python=${VIXML_PYTHON:-$root/.venv/bin/python}
partition=${VIXML_PARTITION:-} account=${VIXML_ACCOUNT:-} job_name=${VIXML_JOB_NAME:-vixml}
save_seconds=${VIXML_SAVE_SECONDS:-300} max_restarts=${VIXML_MAX_RESTARTS:-20}
value_flags="nodes gpus_per_node cpus_per_gpu time workdir data_dir python partition account job_name save_seconds
  max_restarts"

main() {
  parse_flags "${value_flags//$'\n'/ }" "dry_run" "$@"
  need time workdir data_dir
  need_number nodes gpus_per_node cpus_per_gpu save_seconds max_restarts
  need_config
  # TERM@ and not B:TERM@: the signal is for the processes that train. The batch shell could hand it on only through
  # srun, which kills its tasks at once when it gets SIGTERM.
  local command=(
    sbatch --job-name="$job_name" --nodes="$nodes" --ntasks-per-node="$gpus_per_node" --gpus-per-node="$gpus_per_node"
    --cpus-per-task="$cpus_per_gpu" --time="$time" --signal="TERM@$save_seconds" --requeue --open-mode=append
    --chdir="$root" --output="$workdir/slurm-%j.log")
  [[ -z $partition ]] || command+=(--partition="$partition")
  [[ -z $account ]] || command+=(--account="$account")
  execute mkdir -p "$workdir"  # sbatch does not make the folder of its log.
  execute "${command[@]}" "$root/launch/slurm.sbatch" "$python" "$workdir" "$max_restarts" \
    "${arguments[@]}" "--config.dataset.data_dir=$data_dir"
  if [[ $dry_run == true ]]; then
    sed 's/^/# /' "$root/launch/slurm.sbatch"
  fi
}

main "$@"

#!/usr/bin/env bash
# Trains, predicts, encodes, evaluates or makes image features on GPU nodes of a SLURM cluster, with one process for each
# GPU.
#
#   launch/slurm.sh --nodes=2 --gpus_per_node=8 --time=24:00:00 --workdir=DIR --data_dir=DIR [flags] \
#     -- --config=configs/lf_amazon_1.3m.py [--config.train.epochs=30 ...]
#   launch/slurm.sh --command=predict --time=1:00:00 --workdir=DIR ... -- --queries=q.parquet --output=top.parquet
#
# Submits slurm.sbatch, which saves a checkpoint and requeues itself before its time limit until training has finished.
# predict, encode and features keep their finished blocks instead.
#
# Flags (--name=value; except for switches, the default is the environment variable VIXML_NAME). sbatch reads other
# options from the environment: SBATCH_QOS, SBATCH_CONSTRAINT, SBATCH_EXCLUSIVE, ...
#   --command         what the processes do: train (the default), evaluate, predict, encode or features
#   --nodes, --gpus_per_node   number of nodes, and of GPUs of each; by default 1 and 8
#   --time            time limit of one job, such as 24:00:00
#   --workdir         workdir of the run, on a file system that all nodes see; features has none
#   --data_dir        folder of prepared data sets, on such a file system; for train and features, and for evaluate if it
#                     has moved
#   --log_dir         folder of the logs of predict, encode and features; by default OUTPUT.logs, or features.logs in
#                     --data_dir. Those of train and evaluate are in the workdir
#   --python          Python with vixml_jax and jax[cuda12], on such a file system; by default .venv/bin/python of the
#                     repository
#   --partition, --account, --job_name   passed to sbatch
#   --cpus_per_gpu    CPU cores for each GPU; by default 8
#   --save_seconds    seconds before the time limit at which SIGTERM is sent, on which a run saves a checkpoint; by default 300
#   --max_restarts    maximum number of times that the job requeues itself; by default 20
#   --max_hours       stop the command for good after so many hours from now, time in the queue included; by default never
#   --dry-run         print the command, and the batch script as comments, without submitting it

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# shellcheck source=launch/commands.sh
source "$(dirname "${BASH_SOURCE[0]}")/commands.sh"
# shellcheck source=launch/preflight.sh
source "$(dirname "${BASH_SOURCE[0]}")/preflight.sh"

nodes=${VIXML_NODES:-1} gpus_per_node=${VIXML_GPUS_PER_NODE:-8} cpus_per_gpu=${VIXML_CPUS_PER_GPU:-8}
time=${VIXML_TIME:-} workdir=${VIXML_WORKDIR:-} data_dir=${VIXML_DATA_DIR:-}
log_dir=${VIXML_LOG_DIR:-}
python=${VIXML_PYTHON:-$root/.venv/bin/python}
partition=${VIXML_PARTITION:-} account=${VIXML_ACCOUNT:-} job_name=${VIXML_JOB_NAME:-vixml}
save_seconds=${VIXML_SAVE_SECONDS:-300} max_restarts=${VIXML_MAX_RESTARTS:-20}
max_hours=${VIXML_MAX_HOURS:-}
value_flags="command nodes gpus_per_node cpus_per_gpu time workdir data_dir log_dir python partition account job_name save_seconds
  max_restarts max_hours"

# check_files: what predict, encode and evaluate read is there, and their result can be written. Like the nodes, this
# machine sees these files. A dry run checks none.
check_files() {
  local name value
  [[ $dry_run == false ]] || return 0
  cd "$root"  # As the job does.
  [[ $command == features || -f $workdir/config.json ]] \
    || fail "--workdir=$workdir: has no config.json; it must be the workdir of a run"
  [[ $command != predict || -f $workdir/index/CURRENT ]] \
    || fail "--workdir=$workdir: has no label index; vixml evaluate writes it, if there is a checkpoint"
  for name in queries image_checkpoint; do
    value_of "$name"
    [[ $name == image_checkpoint && $value != /* ]] || [[ -z $value || -e $value ]] \
      || fail "--$name=$value: no such file"
  done
  value_of output
  [[ -z $value || -w $(dirname -- "$value") ]] \
    || fail "--output=$value: its folder does not exist or cannot be written to"
  if [[ $command == features ]]; then
    read_config
    return
  fi
  read_config "$(< "$workdir/config.json")"
  [[ $frozen != true || $pretrained != /* || -d $pretrained ]] \
    || fail "--workdir=$workdir: reads its encoder from $pretrained, which does not exist"
}

# command_flags: sets `flags` to the flags of the command, and `folder` to that of its logs and states.
command_flags() {
  local value
  flags=("${arguments[@]}") folder=$workdir
  case $command in
    train) need data_dir; flags+=("--config.dataset.data_dir=$data_dir") ;;
    evaluate) [[ -z $data_dir ]] || flags+=("--data_dir=$data_dir") ;;
    features) need data_dir; flags+=("--config.dataset.data_dir=$data_dir") folder=${log_dir:-$data_dir/features.logs} ;;
    *) value_of output; flags+=("--workdir=$workdir") folder=${log_dir:-${value%/}.logs} ;;
  esac
}

main() {
  local flags folder
  parse_flags "${value_flags//$'\n'/ }" "dry_run" "$@"
  need_command
  need time
  [[ $command == features ]] || need workdir
  need_number nodes gpus_per_node cpus_per_gpu save_seconds max_restarts
  need_decimal max_hours
  need_flags
  command_flags
  [[ $command == train ]] || check_files
  # TERM@ and not B:TERM@: the signal must reach the training processes. The batch shell could forward it only through
  # srun, which kills its tasks at once when it receives SIGTERM.
  local submit=(
    sbatch --job-name="$job_name" --nodes="$nodes" --ntasks-per-node="$gpus_per_node" --gpus-per-node="$gpus_per_node"
    --cpus-per-task="$cpus_per_gpu" --time="$time" --signal="TERM@$save_seconds" --requeue --open-mode=append
    --chdir="$root" --output="$folder/slurm-%j.log")
  [[ -z $partition ]] || submit+=(--partition="$partition")
  [[ -z $account ]] || submit+=(--account="$account")
  execute mkdir -p "$folder"  # sbatch does not create the folder of its log.
  execute "${submit[@]}" "$root/launch/slurm.sbatch" "$python" "$folder" "$max_restarts" \
    "$(later "$max_hours")" "$module" "${flags[@]}"
  if [[ $dry_run == true ]]; then
    sed 's/^/# /' "$root/launch/slurm.sbatch"
  fi
}

main "$@"

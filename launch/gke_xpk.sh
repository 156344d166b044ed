#!/usr/bin/env bash
# Trains, predicts, encodes, evaluates or makes image features on TPU slices or GPU nodes of a GKE cluster through xpk
# (https://github.com/AI-Hypercomputer/xpk).
#
#   launch/gke_xpk.sh submit --cluster=C --name=WORKLOAD --type=v5litepod-16 --image=IMAGE --project=P --zone=Z \
#     [flags] -- --config=configs/lf_amazon_1.3m.py [--config.train.epochs=30 ...]
#   launch/gke_xpk.sh submit --command=predict ... -- --workdir=gs://BUCKET/runs/RUN --queries=gs://BUCKET/q.parquet \
#     --output=gs://BUCKET/top.parquet
#
# Commands, in the order of a first run:
#   cluster  check, then create a cluster of the type        image   build and push the container image
#   storage  let the workloads of the cluster mount BUCKET   stage   copy data and weights to the bucket
#   check    check login, project, bucket, config, data      submit  check, then start --command
#   list     show the workloads and their states             logs    follow the logs of all workers
#   delete   stop the workload; training saves a checkpoint  delete_cluster   delete the cluster and all that it costs
#
# Flags (--name=value; except for switches, the default is the environment variable VIXML_NAME):
#   --command       what the workers do: train (the default), evaluate (the run --run), predict, encode or features
#   --project, --zone, --cluster   Google Cloud project, zone and cluster
#   --name          name of the workload
#   --type          v5litepod-16, v5p-32, v6e-16, tpu7x-16, ...; or nodes with GPUs: h100-80gb-8, h200-141gb-8, ...
#   --num_slices    number of TPU slices, or of GPU nodes; by default 1. Slices share the batch over the data center
#                   network
#   --image         full name of the image, REGION-docker.pkg.dev/PROJECT/REPOSITORY/vixml:TAG
#   --bucket        bucket; for storage, stage, check and submit
#   --storage       xpk's name of the attached bucket; by default vixml-bucket
#   --run           name of the run, which is stored in gs://BUCKET/runs/RUN; by default the name of the workload.
#                   predict, encode and features have their logs in gs://BUCKET/jobs/RUN
#   --data_dir, --raw_dir, --weights   local folders to stage; of --data_dir, what the config after -- needs, and
#                   everything without a config. submit needs --weights and --raw_dir if they were staged
#   --python        local Python with vixml_jax, which checks the config; by default .venv/bin/python
#   --max_hours     stop the command for good after so many hours from now, time in the queue included; by default never
#   --price_per_chip_hour   price of a chip for an hour, from which cluster and submit print the cost
#   --compile_cache folder in the bucket that keeps compiled programs, gs://BUCKET/...; by default none
#   --max_restarts  maximum number of restarts of a workload; by default 20
#   --reservation   cluster: use a slice of this reservation
#   --spot          cluster: use a slice that can be preempted
#   --root_image    image: run as root, for nodes that give their devices to root only
#   --dry-run       print the commands without running them

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# shellcheck source=launch/commands.sh
source "$(dirname "${BASH_SOURCE[0]}")/commands.sh"
# shellcheck source=launch/preflight.sh
source "$(dirname "${BASH_SOURCE[0]}")/preflight.sh"
stages=false

project=${VIXML_PROJECT:-} zone=${VIXML_ZONE:-} cluster=${VIXML_CLUSTER:-} name=${VIXML_NAME:-} type=${VIXML_TYPE:-}
image=${VIXML_IMAGE:-} bucket=${VIXML_BUCKET:-} storage=${VIXML_STORAGE:-vixml-bucket} run=${VIXML_RUN:-}
data_dir=${VIXML_DATA_DIR:-} raw_dir=${VIXML_RAW_DIR:-} weights=${VIXML_WEIGHTS:-}
max_restarts=${VIXML_MAX_RESTARTS:-20} reservation=${VIXML_RESERVATION:-} num_slices=${VIXML_NUM_SLICES:-1}
python=${VIXML_PYTHON:-$root/.venv/bin/python} max_hours=${VIXML_MAX_HOURS:-}
price_per_chip_hour=${VIXML_PRICE_PER_CHIP_HOUR:-} compile_cache=${VIXML_COMPILE_CACHE:-}
spot=false root_image=false
value_flags="command project zone cluster name type num_slices image bucket storage run data_dir raw_dir weights python max_hours
  price_per_chip_hour compile_cache max_restarts reservation"

mount=/bucket
home=/tmp/vixml

# has_gpus: whether --type is a node with GPUs. Types of TPUs are xpk's names of slices.
has_gpus() {
  [[ $type != v[0-9]* && $type != tpu* ]]
}

# hardware_flags: sets `hardware` to xpk's flags of the type and the number of slices or nodes.
hardware_flags() {
  if has_gpus; then
    hardware=(--device-type="$type" --num-nodes="$num_slices")
  else
    hardware=(--tpu-type="$type" --num-slices="$num_slices")
  fi
}

# --max_hours limits a workload, not the cluster.
make_cluster() {
  need cluster type
  local capacity=--on-demand hardware count
  count=$(chips)
  check_login
  check_project
  announce_cost "$count" "" "$price_per_chip_hour" "charged until delete_cluster, with or without a workload"
  [[ $spot == false ]] || capacity=--spot
  [[ -z $reservation ]] || capacity=--reservation=$reservation
  hardware_flags
  execute xpk cluster create --cluster="$cluster" "${hardware[@]}" "$capacity" "${where[@]}" \
    --enable-workload-identity --enable-gcsfuse-csi-driver
}

delete_cluster() {
  need cluster
  execute xpk cluster delete --cluster="$cluster" "${where[@]}" --force
}

# The same options as on TPU VMs (tpu_worker.sh): no name caches; folders are renamed in one step or not at all. The
# bucket belongs to the user of the image.
attach_storage() {
  need cluster bucket
  local options=implicit-dirs,metadata-cache:ttl-secs:0,metadata-cache:negative-ttl-secs:0
  options+=,file-system:rename-dir-limit:0,uid=1000,gid=1000
  execute xpk storage attach "$storage" --type=gcsfuse --cluster="$cluster" "${where[@]}" --bucket="$bucket" --size=1 \
    --mount-point="$mount" --readonly=false --auto-mount=false --no-prefetch-metadata \
    --mount-options="$options"
}

build_image() {
  need image type
  local file=Dockerfile user=()
  ! has_gpus || file=Dockerfile.cuda
  [[ $root_image == false ]] || user=(--build-arg=user=root)
  execute docker buildx build --platform=linux/amd64 --file="$root/launch/$file" ${user[@]+"${user[@]}"} \
    --tag="$image" --push "$root"
}

stage() {
  local folders=()
  need bucket
  need_folder data_dir raw_dir weights
  [[ -n $data_dir$raw_dir$weights ]] || fail "--data_dir, --raw_dir, --weights: nothing to stage; give one of them"
  if ((${#arguments[@]})) && ! answers_queries && [[ $command != evaluate ]]; then
    need_flags
    read_config
    [[ -z $data_dir ]] || mapfile -t folders < <(data_folders)
  fi
  stage_folders "$bucket" "$data_dir" "$raw_dir" "$weights" ${folders[@]+"${folders[@]}"}
}

# Prints the number of chips of all slices. Types of v4, v5p and tpu7x count cores, two for each chip; those of GPUs end
# with the number of GPUs of a node.
chips() {
  local count=${type##*-}
  [[ $count =~ ^[0-9]+$ ]] || fail "--type=$type: must end with a number, as v5litepod-16 or h100-80gb-8"
  case $type in
    v4-* | v5p-* | tpu7x-*) echo $((num_slices * count / 2)) ;;
    *) echo $((num_slices * count)) ;;
  esac
}

# Data and weights must be in the bucket before the workload starts; submit stages nothing.
check() {
  local count data_dir=""
  need bucket type
  need_flags
  need_places
  count=$(chips)
  read_config
  check_login
  check_project
  check_bucket
  check_inputs
  announce_cost "$count" "$max_hours" "$price_per_chip_hour"
}

submit() {
  need cluster name type image bucket
  need_flags
  need_plain_name weights
  check
  local flags=() copies=() folder place value started=("${arguments[@]}")
  local settings=() limits=() join=--distributed hardware deadline
  # The others write their result elsewhere: in jobs/ are their logs.
  place=("--job=$home/jobs/$run" "--store=$mount/jobs/$run")
  ! writes_run || place=("--workdir=$home/runs/$run" "--store=$mount/runs/$run")
  case $command in
    train) flags=("--config.dataset.data_dir=$home/data"); copies=("--copy=$mount/data:$home/data") ;;
    evaluate) flags=("--data_dir=$home/data"); copies=("--copy=$mount/data:$home/data") ;;
    # All workers see each other's parts in the bucket.
    features) flags=("--config.dataset.data_dir=$mount/data") ;;
    *) value_of output; folder=$(output_folder "$value"); [[ -z $folder ]] || copies=("--make=$mount/$folder") ;;
  esac
  if [[ -n $weights ]]; then
    folder=weights/$(basename -- "$weights")
    copies+=("--copy=$mount/$folder:$home/$folder")
    [[ $command != train ]] || flags+=("--config.encoder.pretrained=$home/$folder")
  fi
  if [[ -n $raw_dir ]] && ! answers_queries; then
    copies+=("--copy=$mount/raw:$home/raw")
    [[ $command == evaluate ]] || flags+=("--config.dataset.raw_dir=$home/raw")
  fi
  mount_arguments started "$mount"
  deadline=$(later "$max_hours")
  [[ -z $deadline ]] || limits+=("--deadline=$deadline")
  [[ -z $compile_cache ]] \
    || settings+=("--env=JAX_COMPILATION_CACHE_DIR=$mount/${compile_cache#"gs://$bucket/"}")
  # JAX finds the workers of TPU slices by itself. Nodes with GPUs need the address of the first, which is its name in
  # the JobSet of xpk; the shell of the container knows the number of its node.
  if has_gpus; then
    # shellcheck disable=SC2016
    join="--coordinator=$name-slice-job-0-0.$name:8476 --num_processes=$num_slices"' --process="$JOB_COMPLETION_INDEX"'
  fi
  hardware_flags
  local worker=(
    bash launch/train_worker.sh "${place[@]}" ${copies[@]+"${copies[@]}"} ${limits[@]+"${limits[@]}"}
    -- python -m "vixml_jax.$module" ${started[@]+"${started[@]}"} ${flags[@]+"${flags[@]}"})
  # exec: xpk sends SIGTERM to the shell of the command, so the worker must replace that shell. The grace period applies
  # when a node is drained; a preempted spot machine gives less time.
  execute xpk workload create --cluster="$cluster" --workload="$name" "${hardware[@]}" \
    --docker-image="$image" --storage="$storage" --max-restarts="$max_restarts" \
    --termination-grace-period-seconds=600 "${where[@]}" ${settings[@]+"${settings[@]}"} \
    --command="exec $(quoted "${worker[@]}") $join"
}

list() {
  need cluster
  execute xpk workload list --cluster="$cluster" "${where[@]}"
}

logs() {
  need cluster name
  # xpk creates regional clusters, and names the container jax-tpu, or gpu-image on nodes with GPUs.
  execute gcloud container clusters get-credentials "$cluster" --region="${zone%-*}" --project="$project"
  local container=jax-tpu
  ! has_gpus || container=gpu-image
  execute kubectl logs --selector="xpk.google.com/workload=$name" --container="$container" --prefix --tail=100 --follow \
    --max-log-requests=256
}

delete_workload() {
  need cluster name
  execute xpk workload delete --cluster="$cluster" --workload="$name" "${where[@]}" --force
}

main() {
  local word=${1:-} action
  case $word in
    stage | check | submit | list | logs | delete_cluster) action=$word ;;
    cluster) action=make_cluster ;;
    storage) action=attach_storage ;;
    image) action=build_image ;;
    delete) action=delete_workload ;;
    --help) usage; return ;;
    *) fail "'$word': must be cluster, image, storage, stage, check, submit, list, logs, delete or delete_cluster; \
see --help" ;;
  esac
  shift
  parse_flags "${value_flags//$'\n'/ }" "spot root_image dry_run" "$@"
  need_command
  need project zone
  need_number max_restarts num_slices
  need_decimal max_hours price_per_chip_hour
  ((num_slices > 0)) || fail "--num_slices=$num_slices: must be at least 1"
  bucket=${bucket#gs://}
  run=${run:-$name}
  need_name zone bucket cluster name run
  [[ -z $compile_cache || $compile_cache == "gs://$bucket/"?* ]] \
    || fail "--compile_cache=$compile_cache: must be a folder of the bucket, as gs://$bucket/compile_cache"
  where=(--project="$project" --zone="$zone")
  "$action"
}

main "$@"

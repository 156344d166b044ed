#!/usr/bin/env bash
# Trains on a TPU slice of a GKE cluster through xpk (https://github.com/AI-Hypercomputer/xpk).
#
#   launch/gke_xpk.sh submit --cluster=C --name=WORKLOAD --type=v5litepod-16 --image=IMAGE --project=P --zone=Z \
#     [flags] -- --config=configs/lf_amazon_1.3m.py [--config.train.epochs=30 ...]
#
# Commands, in the order of a first run:
#   cluster  create a cluster with a slice of the type       image   build and push the container image
#   storage  let the workloads of the cluster mount BUCKET   stage   copy data and weights to the bucket
#   submit   start training                                  list    show the workloads and their states
#   logs     follow the logs of all workers                  delete  stop the workload; it saves a checkpoint
#
# Flags (--name=value; except for switches, the default is the environment variable VIXML_NAME):
#   --project, --zone, --cluster   Google Cloud project, zone and cluster
#   --name          name of the workload
#   --type          xpk's --tpu-type: v5litepod-16, v5p-32, v6e-16, ...
#   --image         full name of the image, REGION-docker.pkg.dev/PROJECT/REPOSITORY/vixml:TAG
#   --bucket        bucket, without gs://; for storage and stage
#   --storage       xpk's name of the attached bucket; by default vixml-bucket
#   --run           name of the run, which is stored in gs://BUCKET/runs/RUN; by default the name of the workload
#   --data_dir, --raw_dir, --weights   local folders to stage; submit needs --weights and --raw_dir if they were staged
#   --max_restarts  maximum number of restarts of a workload; by default 20
#   --reservation   cluster: use a slice of this reservation
#   --spot          cluster: use a slice that can be preempted
#   --dry-run       print the commands without running them

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

project=${VIXML_PROJECT:-} zone=${VIXML_ZONE:-} cluster=${VIXML_CLUSTER:-} name=${VIXML_NAME:-} type=${VIXML_TYPE:-}
image=${VIXML_IMAGE:-} bucket=${VIXML_BUCKET:-} storage=${VIXML_STORAGE:-vixml-bucket} run=${VIXML_RUN:-}
data_dir=${VIXML_DATA_DIR:-} raw_dir=${VIXML_RAW_DIR:-} weights=${VIXML_WEIGHTS:-}
max_restarts=${VIXML_MAX_RESTARTS:-20} reservation=${VIXML_RESERVATION:-}
spot=false
value_flags="project zone cluster name type image bucket storage run data_dir raw_dir weights max_restarts reservation"

mount=/bucket
home=/tmp/vixml

make_cluster() {
  need cluster type
  local capacity=--on-demand
  [[ $spot == false ]] || capacity=--spot
  [[ -z $reservation ]] || capacity=--reservation=$reservation
  execute xpk cluster create --cluster="$cluster" --tpu-type="$type" --num-slices=1 "$capacity" "${where[@]}" \
    --enable-workload-identity --enable-gcsfuse-csi-driver
}

# The same options as on TPU VMs (tpu_worker.sh): no name caches; folders are renamed in one step or not at all.
attach_storage() {
  need cluster bucket
  local options=implicit-dirs,metadata-cache:ttl-secs:0,metadata-cache:negative-ttl-secs:0
  options+=,file-system:rename-dir-limit:0
  execute xpk storage attach "$storage" --type=gcsfuse --cluster="$cluster" "${where[@]}" --bucket="$bucket" --size=1 \
    --mount-point="$mount" --readonly=false --auto-mount=false --no-prefetch-metadata \
    --mount-options="$options"
}

build_image() {
  need image
  execute docker buildx build --platform=linux/amd64 --file="$root/launch/Dockerfile" --tag="$image" --push "$root"
}

stage() {
  need bucket
  need_folder data_dir raw_dir weights
  [[ -n $data_dir$raw_dir$weights ]] || fail "--data_dir, --raw_dir, --weights: nothing to stage; give one of them"
  stage_folders "$bucket" "$data_dir" "$raw_dir" "$weights"
}

submit() {
  need cluster name type image
  need_config
  local flags=("--config.dataset.data_dir=$home/data") copies=("--copy=$mount/data:$home/data") folder
  if [[ -n $weights ]]; then
    folder=weights/$(basename "$weights")
    copies+=("--copy=$mount/$folder:$home/$folder")
    flags+=("--config.encoder.pretrained=$home/$folder")
  fi
  if [[ -n $raw_dir ]]; then
    copies+=("--copy=$mount/raw:$home/raw")
    flags+=("--config.dataset.raw_dir=$home/raw")
  fi
  local worker=(
    bash launch/train_worker.sh --workdir="$home/runs/$run" --store="$mount/runs/$run" "${copies[@]}" --
    python -m vixml_jax.main "${arguments[@]}" "${flags[@]}" --distributed)
  # exec: xpk sends SIGTERM to the shell of the command, so the worker must replace that shell. The grace period applies
  # when a node is drained; a preempted spot machine gives less time.
  execute xpk workload create --cluster="$cluster" --workload="$name" --tpu-type="$type" --num-slices=1 \
    --docker-image="$image" --storage="$storage" --max-restarts="$max_restarts" \
    --termination-grace-period-seconds=600 "${where[@]}" --command="exec $(quoted "${worker[@]}")"
}

list() {
  need cluster
  execute xpk workload list --cluster="$cluster" "${where[@]}"
}

logs() {
  need cluster name
  # xpk creates regional clusters and names its container jax-tpu.
  execute gcloud container clusters get-credentials "$cluster" --region="${zone%-*}" --project="$project"
  execute kubectl logs --selector="xpk.google.com/workload=$name" --container=jax-tpu --prefix --tail=100 --follow \
    --max-log-requests=256
}

delete_workload() {
  need cluster name
  execute xpk workload delete --cluster="$cluster" --workload="$name" "${where[@]}" --force
}

main() {
  local word=${1:-} action
  case $word in
    stage | submit | list | logs) action=$word ;;
    cluster) action=make_cluster ;;
    storage) action=attach_storage ;;
    image) action=build_image ;;
    delete) action=delete_workload ;;
    --help) usage; return ;;
    *) fail "'$word': must be cluster, image, storage, stage, submit, list, logs or delete; see --help" ;;
  esac
  shift
  parse_flags "$value_flags" "spot dry_run" "$@"
  need project zone
  need_number max_restarts
  bucket=${bucket#gs://}
  run=${run:-$name}
  where=(--project="$project" --zone="$zone")
  "$action"
}

main "$@"

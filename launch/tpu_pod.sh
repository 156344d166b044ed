#!/usr/bin/env bash
# Trains on a Cloud TPU pod of TPU VMs, obtained as a queued resource.
#
#   launch/tpu_pod.sh run --name=POD --type=v5litepod-16 --bucket=BUCKET --project=P --zone=Z [flags] \
#     -- --config=configs/lf_amazon_1.3m.py [--config.train.epochs=30 ...]
#
# Commands:
#   run      stage, create, wait, setup, train and watch; a preempted pod is requested again, and training continues
#            from its newest checkpoint
#   create   request the pod                                wait     wait until the pod is active
#   stage    copy code, data and weights to the bucket      setup    copy them to every worker, and install
#   train    start training on all workers, and return      watch    wait until training ends; status 0 if it finished
#   status   show the states of the pod and the workers     logs     follow the log of one worker
#   stop     save a checkpoint and stop training            delete   delete the pod
#
# Flags (--name=value; except for switches, the default is the environment variable VIXML_NAME):
#   --project, --zone, --bucket, --name   Google Cloud project, zone, bucket, and name of the pod
#   --type             accelerator type: v4-32, v5litepod-16, v5p-32, v6e-16, ...
#   --runtime_version  image of the VMs; by default the image for the type
#   --run              name of the run, which is stored in gs://BUCKET/runs/RUN; by default the name of the pod
#   --data_dir, --raw_dir, --weights   local folders to stage: prepared data sets (config.dataset.data_dir), raw files,
#                      a model. For train, --weights names the model that was staged
#   --ref              commit to stage; by default HEAD
#   --service_account, --network, --subnetwork   settings of the VMs; by default those of the project
#   --reservation      use this reservation
#   --valid_for        how long the request can wait, such as 24h; by default without limit
#   --max_restarts     maximum number of times that `run` starts training again; by default 20
#   --poll_seconds     seconds between checks of the pod; by default 60
#   --worker           worker whose log to follow; by default 0
#   --spot             use a pod that can be preempted
#   --internal_ips     VMs without external addresses: reached through IAP; they reach packages through Cloud NAT
#   --delete           run: delete the pod when training has ended
#   --dry-run          print the commands without running them

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

project=${VIXML_PROJECT:-} zone=${VIXML_ZONE:-} bucket=${VIXML_BUCKET:-} name=${VIXML_NAME:-} type=${VIXML_TYPE:-}
runtime_version=${VIXML_RUNTIME_VERSION:-} run=${VIXML_RUN:-} ref=${VIXML_REF:-HEAD}
data_dir=${VIXML_DATA_DIR:-} raw_dir=${VIXML_RAW_DIR:-} weights=${VIXML_WEIGHTS:-}
service_account=${VIXML_SERVICE_ACCOUNT:-} network=${VIXML_NETWORK:-} subnetwork=${VIXML_SUBNETWORK:-}
reservation=${VIXML_RESERVATION:-} valid_for=${VIXML_VALID_FOR:-} max_restarts=${VIXML_MAX_RESTARTS:-20}
poll_seconds=${VIXML_POLL_SECONDS:-60} worker=${VIXML_WORKER:-0}
spot=false internal_ips=false delete=false
value_flags="project zone bucket name type runtime_version run ref data_dir raw_dir weights service_account network
  subnetwork reservation valid_for max_restarts poll_seconds worker"

# Return values of an attempt at training that did not finish.
lost=2 failed=3 again=4
# Number of checks after which a stopped worker is not taken for a preemption, and of failed calls in a row.
patience=5

# Prints the image for an accelerator type.
runtime_of() {
  case $1 in
    v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) fail "--type=$1: must be v4-N, v5litepod-N, v5p-N or v6e-N; for another type give --runtime_version" ;;
  esac
}

create() {
  need type
  local version=${runtime_version:-$(runtime_of "$type")}
  [[ -n $version ]] || exit 1
  local command=(
    gcloud compute tpus queued-resources create "$name" "${where[@]}" --node-id="$name" --accelerator-type="$type"
    --runtime-version="$version" --scopes=https://www.googleapis.com/auth/cloud-platform)
  [[ $spot == false ]] || command+=(--spot)
  [[ -z $reservation ]] || command+=(--reservation="$reservation")
  [[ -z $valid_for ]] || command+=(--valid-until-duration="$valid_for")
  [[ -z $service_account ]] || command+=(--service-account="$service_account")
  [[ -z $network ]] || command+=(--network="$network")
  [[ -z $subnetwork ]] || command+=(--subnetwork="$subnetwork")
  [[ $internal_ips == false ]] || command+=(--internal-ips)
  execute "${command[@]}"
}

queued_state() {
  execute gcloud compute tpus queued-resources describe "$name" "${where[@]}" '--format=value(state.state)'
}

# Sets `state` to the state of the pod. A few calls in a row may fail.
look() {
  local failures=0
  until state=$(queued_state); do
    ((++failures < patience)) || fail "$name: gcloud does not report its state; see above"
    sleep "$poll_seconds"
  done
}

# Waits for the pod. Returns 0 when it is active, and `lost` when this request will not yield a pod.
wait_active() {
  if [[ $dry_run == true ]]; then
    queued_state
    return
  fi
  local state before=""
  while look; do
    [[ $state == "$before" ]] || note "$name: $state"
    before=$state
    case $state in
      ACTIVE) return 0 ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING) return "$lost" ;;
    esac
    sleep "$poll_seconds"
  done
}

wait_for_pod() {
  wait_active || fail "$name: will not become ACTIVE; see '$0 status', then delete and create it again"
}

# on WORKER COMMAND: runs a shell command on a worker, or on all.
on() {
  local command=(gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --quiet --worker="$1" --command="$2")
  [[ $internal_ips == false ]] || command+=(--tunnel-through-iap)
  execute "${command[@]}"
}

stage() {
  need bucket
  need_folder data_dir raw_dir weights
  local archive=${TMPDIR:-/tmp}/vixml-$name.tar.gz
  if [[ $dry_run == false && -n $(git -C "$root" status --porcelain) ]]; then
    note "uncommitted changes in $root are not staged; the commit $ref is"
  fi
  execute git -C "$root" archive --format=tar.gz --output="$archive" "$ref"
  execute gcloud storage cp "$archive" "gs://$bucket/code/$name.tar.gz"
  stage_folders "$bucket" "$data_dir" "$raw_dir" "$weights"
}

setup() {
  need bucket
  local fetch="set -o pipefail; rm -rf vixml/code && mkdir -p vixml/code"
  fetch+=" && gcloud storage cat $(quoted "gs://$bucket/code/$name.tar.gz") | tar -xzf - -C vixml/code"
  on all "$fetch && bash vixml/code/launch/tpu_worker.sh setup $(quoted "$bucket")"
}

train() {
  need bucket
  need_config
  local command=(bash vixml/code/launch/tpu_worker.sh start "$run")
  [[ -z $weights ]] || command+=(--weights="$(basename "$weights")")
  # The outcome of an earlier start must not be taken for the outcome of this one. Before the first start there is none.
  execute gcloud storage rm --quiet "gs://$bucket/runs/$run/state/*" 2> /dev/null || true
  on all "$(quoted "${command[@]}" -- "${arguments[@]}")"
}

worker_states() {
  execute gcloud storage cat "gs://$bucket/runs/$run/state/*"
}

# Follows a run until it ends. Returns 0 when all workers have finished, `failed` when one has refused its input, `lost`
# when the pod no longer exists, and `again` when workers have stopped and the pod still exists.
watch_run() {
  need bucket
  if [[ $dry_run == true ]]; then
    queued_state
    worker_states
    return
  fi
  local state states stopped=0 before=""
  while look; do
    [[ $state == ACTIVE ]] || return "$lost"
    states=$(worker_states) || states=""  # There is no state until the first worker has started.
    [[ $states == "$before" ]] || note "workers: ${states//$'\n'/ }"
    before=$states
    if grep -qx failed <<< "$states"; then
      return "$failed"
    elif [[ -n $states ]] && ! grep -qvx finished <<< "$states"; then
      return 0
    elif grep -qx again <<< "$states"; then
      ((++stopped < patience)) || return "$again"
    fi
    sleep "$poll_seconds"
  done
}

watch_until_end() {
  local outcome=0
  watch_run || outcome=$?
  case $outcome in
    0) ;;
    "$lost") fail "$name: preempted; '$0 run' requests it again and continues" ;;
    "$failed") fail "$run: a worker refused its input; see '$0 logs'" ;;
    *) fail "$run: stopped before its end; '$0 train' continues from the newest checkpoint" ;;
  esac
}

# Tries to complete the run on the pod that was requested.
attempt() {
  wait_active || return
  if ! { setup || setup; } || ! train; then  # An ssh connection may fail once.
    if wait_active; then
      fail "$name: cannot be set up; see above, then run the command again"
    fi
    return "$lost"
  fi
  watch_run
}

renew() {
  delete_pod
  create
}

run_to_end() {
  need bucket type
  need_config
  stage
  if [[ $dry_run == true ]]; then
    create
    attempt
    echo "# when the pod is preempted, at most $max_restarts times: the next two commands, then all from describe on"
    renew
  else
    queued_state > /dev/null 2>&1 || create
    local restarts=0 outcome
    while outcome=0; attempt || outcome=$?; ((outcome)); do
      ((outcome != failed)) || fail "$run: a worker refused its input; see '$0 logs'"
      ((restarts++ < max_restarts)) || fail "$run: stopped $restarts times, more than --max_restarts=$max_restarts"
      if ((outcome == lost)); then
        note "$name: preempted or refused; requesting it again ($restarts of $max_restarts)"
        renew
      else
        note "$run: stopped; starting again ($restarts of $max_restarts)"
      fi
    done
    note "$run: finished; its results are in gs://$bucket/runs/$run"
  fi
  if [[ $delete == true ]]; then
    delete_pod
  fi
}

status() {
  need bucket
  queued_state
  worker_states
}

logs() {
  on "$worker" "tail -n 100 -F $(quoted "vixml/runs/$run/logs/worker-$worker.log")"
}

stop() {
  on all "bash vixml/code/launch/tpu_worker.sh stop"
}

delete_pod() {
  execute gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
}

main() {
  local word=${1:-} action commands="run|create|wait|stage|setup|train|watch|status|logs|stop|delete"
  case $word in
    create | stage | setup | train | status | logs | stop) action=$word ;;
    run) action=run_to_end ;;
    wait) action=wait_for_pod ;;
    watch) action=watch_until_end ;;
    delete) action=delete_pod ;;
    --help) usage; return ;;
    *) fail "'$word': must be one of ${commands//|/, }; see --help" ;;
  esac
  shift
  parse_flags "${value_flags//$'\n'/ }" "spot internal_ips delete dry_run" "$@"
  need project zone name
  need_number max_restarts poll_seconds worker
  bucket=${bucket#gs://}
  run=${run:-$name}
  where=(--project="$project" --zone="$zone")
  "$action"
}

main "$@"

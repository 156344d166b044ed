#!/usr/bin/env bash
# Trains, predicts, encodes, evaluates or makes image features on a Cloud TPU pod of TPU VMs, obtained as a queued
# resource.
#
#   launch/tpu_pod.sh run --name=POD --type=v5litepod-16 --bucket=BUCKET --project=P --zone=Z [flags] \
#     -- --config=configs/lf_amazon_1.3m.py [--config.train.epochs=30 ...]
#   launch/tpu_pod.sh run --command=predict --name=POD ... -- --workdir=gs://BUCKET/runs/RUN \
#     --queries=gs://BUCKET/q.parquet --output=gs://BUCKET/top.parquet
#
# Commands:
#   run      check, stage, create, wait, setup, train and watch; a preempted pod is requested again, and training
#            continues from its newest checkpoint, the other commands with the blocks that are not finished
#   check    check login, project, bucket, type, config, data and weights, and print the cost; buys nothing
#   create   request the pod                                wait     wait until the pod is active
#   stage    copy code, data and weights to the bucket      setup    copy them to every worker, and install
#   train    start --command on all workers, and return     watch    wait until it ends; status 0 if it finished
#   status   show the states of the pod and the workers     logs     follow the log of one worker
#   stop     stop it; training saves a checkpoint           delete   delete the pod
#
# Flags (--name=value; except for switches, the default is the environment variable VIXML_NAME):
#   --command          what the workers do: train (the default), evaluate (the run --run), predict, encode or features
#   --project, --zone, --bucket, --name   Google Cloud project, zone, bucket, and name of the pod
#   --type             accelerator type: v4-32, v5litepod-16, v5p-32, v6e-16, ...
#   --runtime_version  image of the VMs; by default the image for the type
#   --run              name of the run, which is stored in gs://BUCKET/runs/RUN; by default the name of the pod.
#                      predict, encode and features have their logs in gs://BUCKET/jobs/RUN
#   --data_dir, --raw_dir, --weights   local folders to stage: prepared data sets (config.dataset.data_dir), raw files,
#                      a model. Of --data_dir, what the config after -- needs is staged, and everything without a
#                      config; predict and encode need none. For train, --weights names the model that was staged
#   --python           local Python with vixml_jax, which checks the config; by default .venv/bin/python
#   --ref              commit to stage; by default HEAD
#   --service_account, --network, --subnetwork   settings of the VMs; by default those of the project
#   --valid_for        how long the request can wait, such as 24h; by default without limit
#   --max_hours        stop the command, and let `run` delete the pod, after so many hours of an active pod
#   --price_per_chip_hour   price of a chip for an hour, from which the cost is printed before anything is bought
#   --compile_cache    folder in the bucket that keeps compiled programs, gs://BUCKET/...; by default none
#   --max_restarts     maximum number of times that `run` starts the command again; by default 20
#   --poll_seconds     seconds between checks of the pod; by default 60
#   --worker           worker whose log to follow; by default 0
#   --spot             use a pod that can be preempted
#   --reserved         use the reservation of the project
#   --internal_ips     VMs without external addresses: run this script in their network; they need Cloud NAT for packages
#   --delete           run: delete the pod when `run` ends, finished or not, except after Ctrl-C
#   --dry-run          print the commands without running them

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# shellcheck source=launch/commands.sh
source "$(dirname "${BASH_SOURCE[0]}")/commands.sh"
# shellcheck source=launch/preflight.sh
source "$(dirname "${BASH_SOURCE[0]}")/preflight.sh"

project=${VIXML_PROJECT:-} zone=${VIXML_ZONE:-} bucket=${VIXML_BUCKET:-} name=${VIXML_NAME:-} type=${VIXML_TYPE:-}
runtime_version=${VIXML_RUNTIME_VERSION:-} run=${VIXML_RUN:-} ref=${VIXML_REF:-HEAD}
data_dir=${VIXML_DATA_DIR:-} raw_dir=${VIXML_RAW_DIR:-} weights=${VIXML_WEIGHTS:-}
service_account=${VIXML_SERVICE_ACCOUNT:-} network=${VIXML_NETWORK:-} subnetwork=${VIXML_SUBNETWORK:-}
valid_for=${VIXML_VALID_FOR:-} max_restarts=${VIXML_MAX_RESTARTS:-20}
poll_seconds=${VIXML_POLL_SECONDS:-60} worker=${VIXML_WORKER:-0} python=${VIXML_PYTHON:-$root/.venv/bin/python}
max_hours=${VIXML_MAX_HOURS:-} price_per_chip_hour=${VIXML_PRICE_PER_CHIP_HOUR:-}
compile_cache=${VIXML_COMPILE_CACHE:-}
spot=false reserved=false internal_ips=false delete=false
value_flags="command project zone bucket name type runtime_version run ref data_dir raw_dir weights python service_account
  network subnetwork valid_for max_hours price_per_chip_hour compile_cache max_restarts poll_seconds worker"

# Return values of an attempt at training that did not finish.
lost=2 failed=3 again=4 expired=5
# Time at which training must end, in seconds since 1970; empty for none. It is set when the pod is first active.
deadline=""
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
  local request=(
    gcloud compute tpus queued-resources create "$name" "${where[@]}" --node-id="$name" --accelerator-type="$type"
    --runtime-version="$version" --scopes=https://www.googleapis.com/auth/cloud-platform)
  [[ $spot == false ]] || request+=(--spot)
  [[ $reserved == false ]] || request+=(--reserved)
  [[ -z $valid_for ]] || request+=(--valid-until-duration="$valid_for")
  [[ -z $service_account ]] || request+=(--service-account="$service_account")
  [[ -z $network ]] || request+=(--network="$network")
  [[ -z $subnetwork ]] || request+=(--subnetwork="$subnetwork")
  [[ $internal_ips == false ]] || request+=(--internal-ips)
  execute "${request[@]}"
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
  local ssh=(gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --quiet --worker="$1" --command="$2")
  [[ $internal_ips == false ]] || ssh+=(--internal-ip)
  execute "${ssh[@]}"
}

# Prints the number of chips of an accelerator type: v4 and v5p count cores, two for each chip.
chips_of() {
  local count=${1##*-}
  [[ $count =~ ^[0-9]+$ ]] || fail "--type=$1: must end with a number, as v5litepod-16"
  case $1 in
    v4-* | v5p-*) echo $((count / 2)) ;;
    *) echo "$count" ;;
  esac
}

check() {
  local chips
  need bucket type
  need_flags
  need_places
  chips=$(chips_of "$type")
  [[ -n $runtime_version ]] || runtime_of "$type" > /dev/null
  read_config
  check_login
  check_project
  check_bucket
  check_type
  check_quota "$chips"
  check_inputs
  announce_cost "$chips" "$max_hours" "$price_per_chip_hour"
}

# The code is piped, so that no file is written here: a name in a shared folder could be another user's link.
stage_code() {
  local archive=(git -C "$root" archive --format=tar.gz "$ref")
  local copy=(gcloud storage cp - "gs://$bucket/code/$name.tar.gz")
  if [[ $dry_run == true ]]; then
    printf '%s | %s\n' "$(quoted "${archive[@]}")" "$(quoted "${copy[@]}")"
    return
  fi
  if [[ -n $(git -C "$root" status --porcelain) ]]; then
    note "uncommitted changes in $root are not staged; the commit $ref is"
  fi
  "${archive[@]}" | "${copy[@]}"
}

stage() {
  local folders=()
  need bucket
  need_folder data_dir raw_dir weights
  if answers_queries; then
    data_dir="" raw_dir=""
  elif ((${#arguments[@]})) && [[ $command != evaluate ]]; then
    need_flags
    read_config
  fi
  [[ -z $data_dir || -z ${dataset:-} ]] || mapfile -t folders < <(data_folders)
  stage_code
  stage_folders "$bucket" "$data_dir" "$raw_dir" "$weights" ${folders[@]+"${folders[@]}"}
}

# The others need fewer folders of the bucket on the disk of every worker than training.
setup() {
  need bucket
  local copied=()
  case $command in
    predict | encode) copied=(weights) ;;
    features) copied=(raw) ;;
  esac
  local fetch="set -o pipefail; rm -rf vixml/code && mkdir -p vixml/code"
  fetch+=" && gcloud storage cat $(quoted "gs://$bucket/code/$name.tar.gz") | tar -xzf - -C vixml/code"
  on all "$fetch && bash vixml/code/launch/tpu_worker.sh setup $(quoted "$bucket" ${copied[@]+"${copied[@]}"})"
}

train() {
  need bucket
  need_flags
  need_places
  need_plain_name weights
  local value start=(bash vixml/code/launch/tpu_worker.sh start "$run") started=(${arguments[@]+"${arguments[@]}"})
  [[ $command == train ]] || start+=(--module="$module")
  [[ $command != train || -z $weights ]] || start+=(--weights="$(basename -- "$weights")")
  [[ -n $deadline ]] || deadline=$(later "$max_hours")
  [[ -z $deadline ]] || start+=(--deadline="$deadline")
  [[ -z $compile_cache ]] || start+=(--compile_cache="${compile_cache#"gs://$bucket/"}")
  if answers_queries; then
    value_of output
    value=$(output_folder "$value")
    [[ -z $value ]] || start+=(--make="$value")
  fi
  # shellcheck disable=SC2088  # vixml_jax puts the home folder of the worker in the place of ~.
  mount_arguments started "~/vixml/bucket"
  # The outcome of an earlier start must not be taken for the outcome of this one. Before the first start there is none.
  execute gcloud storage rm --quiet "gs://$bucket/$run_folder/state/*" 2> /dev/null || true
  on all "$(quoted "${start[@]}" -- ${started[@]+"${started[@]}"})"
}

worker_states() {
  execute gcloud storage cat "gs://$bucket/$run_folder/state/*"
}

# Follows a run until it ends. Returns 0 when all workers have finished, `failed` when one has refused its input,
# `expired` after --max_hours, `lost` when the pod no longer exists, and `again` when workers have stopped and the pod
# still exists.
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
    elif grep -qx expired <<< "$states"; then
      return "$expired"
    elif [[ -n $states ]] && ! grep -qvx finished <<< "$states"; then
      return 0
    elif grep -qx again <<< "$states"; then
      ((++stopped < patience)) || return "$again"
    fi
    # The workers stop themselves. If they cannot, the pod is deleted all the same.
    [[ -z $deadline ]] || (($(date +%s) < deadline + 900)) || return "$expired"
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
    "$expired") fail "$run: stopped after --max_hours; '$0 delete' deletes the pod" ;;
    *) fail "$run: stopped before its end; '$0 train' continues it" ;;
  esac
}

# Tries to complete the run on the pod that was requested.
attempt() {
  wait_active || return
  [[ -n $deadline ]] || deadline=$(later "$max_hours")
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

# Called when `run` ends with an error after it has requested the pod: the pod costs money.
end_with_pod() {
  if [[ $delete == true ]]; then
    note "deleting $name"
    delete_pod
  else
    note "warning: $name may still exist and cost money; '$0 delete' deletes it"
  fi
}

# Ends `run` after --max_hours: nothing that costs money is left.
stop_for_good() {
  note "$run: --max_hours=$max_hours are over; deleting $name"
  trap - EXIT
  stop || true
  delete_pod
  fail "$run: stopped after --max_hours=$max_hours, and $name is deleted; the same command continues"
}

run_to_end() {
  check
  # Weights that were staged before need not be on this machine.
  if [[ -n $weights && ! -d $weights ]]; then
    weights="" stage
  else
    stage
  fi
  if [[ $dry_run == true ]]; then
    create
    attempt
    echo "# when the pod is preempted, at most $max_restarts times: the next two commands, then all from describe on"
    renew
  else
    trap 'trap - EXIT; exit 130' INT TERM
    queued_state > /dev/null 2>&1 || create
    trap end_with_pod EXIT
    local restarts=0 outcome
    while outcome=0; attempt || outcome=$?; ((outcome)); do
      ((outcome != failed)) || fail "$run: a worker refused its input; see '$0 logs'"
      ((outcome != expired)) || stop_for_good
      ((restarts++ < max_restarts)) || fail "$run: stopped $restarts times, more than --max_restarts=$max_restarts"
      if ((outcome == lost)); then
        note "$name: preempted or refused; requesting it again ($restarts of $max_restarts)"
        renew
      else
        note "$run: stopped; starting again ($restarts of $max_restarts)"
      fi
    done
    trap - EXIT
    note "$run: finished; its results are in $(results)"
  fi
  if [[ $delete == true ]]; then
    delete_pod
  fi
}

# results: prints where the results of the command are.
results() {
  local value
  value_of output
  case $command in
    train | evaluate) echo "gs://$bucket/runs/$run" ;;
    features) echo "gs://$bucket/data" ;;
    *) echo "$value" ;;
  esac
}

status() {
  need bucket
  queued_state
  worker_states
}

logs() {
  on "$worker" "tail -n 100 -F $(quoted "vixml/$run_folder/logs/worker-$worker.log")"
}

stop() {
  on all "bash vixml/code/launch/tpu_worker.sh stop"
}

delete_pod() {
  execute gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
}

main() {
  local word=${1:-} action commands="run|check|create|wait|stage|setup|train|watch|status|logs|stop|delete"
  case $word in
    check | create | stage | setup | train | status | logs | stop) action=$word ;;
    run) action=run_to_end ;;
    wait) action=wait_for_pod ;;
    watch) action=watch_until_end ;;
    delete) action=delete_pod ;;
    --help) usage; return ;;
    *) fail "'$word': must be one of ${commands//|/, }; see --help" ;;
  esac
  shift
  parse_flags "${value_flags//$'\n'/ }" "spot reserved internal_ips delete dry_run" "$@"
  need_command
  need project zone name
  need_number max_restarts poll_seconds worker
  need_decimal max_hours price_per_chip_hour
  bucket=${bucket#gs://}
  run=${run:-$name}
  need_name zone bucket name run
  [[ -z $compile_cache || $compile_cache == "gs://$bucket/"?* ]] \
    || fail "--compile_cache=$compile_cache: must be a folder of the bucket, as gs://$bucket/compile_cache"
  where=(--project="$project" --zone="$zone")
  run_folder=jobs/$run
  ! writes_run || run_folder=runs/$run
  "$action"
}

main "$@"

# shellcheck shell=bash disable=SC2154
# Checks of a launch before anything is bought, to be sourced after common.sh. Each prints what it found, or exits with
# one line that says what to do. They only read. The variables are those of the launcher's flags. --dry-run prints their
# commands, except that of read_config. `stages` says whether the launcher stages what is given before it starts.
# shellcheck disable=SC2034
dataset="" stages=true

# ask PROBLEM COMMAND...: sets `answer` to the output of a command. If it fails, exits with PROBLEM and what it said.
ask() {
  local problem=$1 errors said
  shift
  answer=""
  if [[ $dry_run == true ]]; then
    quoted "$@"
    return
  fi
  errors=$(mktemp)
  if ! answer=$("$@" 2> "$errors"); then
    said=$(grep -v '^[[:space:]]*$' "$errors" | head -n 1) || true
    rm -f "$errors"
    fail "$problem (${said:-$1 failed})"
  fi
  rm -f "$errors"
}

# found TEXT: prints what a check found; nothing in a dry run, which has found nothing.
found() {
  [[ $dry_run == true ]] || note "check: $*"
}

# read_config [STORED]: checks the flags after -- as the command checks them, and sets `dataset`, `embedded`, `features`,
# `pretrained` and `frozen` from the config of these flags, or from STORED, the config.json of the run. Without a config,
# they stay empty. It runs on this machine and sends nothing.
read_config() {
  local lines name value
  [[ -x $(command -v "$python") ]] || fail "--python=$python: cannot be run; it must be a Python with vixml_jax, which \
reads the config before anything is bought"
  lines=$(JAX_PLATFORMS=cpu "$python" "$root/launch/read_config.py" "$command" "${arguments[@]}" <<< "${1:-}") || exit 1
  dataset="" embedded="" features="" pretrained="" frozen=""
  while IFS='=' read -r name value; do
    case $name in
      dataset | embedded | features | pretrained | frozen) printf -v "$name" '%s' "$value" ;;
    esac
  done <<< "$lines"
  if [[ -n $dataset ]]; then
    found "config: data set $dataset${features:+, image features $features}, encoder $pretrained"
  elif [[ $command == train || $command == features || -n ${1:-} ]]; then
    fail "--python=$python: did not print the data set of the config"
  fi
}

check_login() {
  command -v gcloud > /dev/null || fail "gcloud: is not installed; see https://cloud.google.com/sdk/docs/install"
  local problem="gcloud: no account is logged in; run: gcloud auth login"
  ask "$problem" gcloud auth list --filter=status:ACTIVE '--format=value(account)'
  [[ $dry_run == true || -n $answer ]] || fail "$problem"
  account=${answer%%$'\n'*}
  found "account: $account"
}

check_project() {
  ask "--project=$project: cannot be read by $account" \
    gcloud projects describe "$project" '--format=value(projectNumber)'
  found "project: $project, number $answer"
}

# Checkpoints need folders that are renamed in one step, which a bucket without hierarchical namespace does not have.
check_bucket() {
  local location namespace
  ask "--bucket=$bucket: cannot be read by $account; launch/README.md shows how to create it" \
    gcloud storage buckets describe "gs://$bucket" '--format=value(location,hierarchical_namespace.enabled)'
  [[ $dry_run == false ]] || return 0
  read -r location namespace <<< "$answer" || true
  [[ ${namespace,,} == true ]] \
    || fail "--bucket=$bucket: has no hierarchical namespace; create one with --enable-hierarchical-namespace"
  found "bucket: gs://$bucket in ${location,,}"
  [[ ${location,,} != *-* || ${location,,} == "${zone%-*}" ]] \
    || note "warning: the bucket is in ${location,,} and the chips are in ${zone%-*}: copying costs time and money"
}

# check_type: the zone offers the accelerator type.
check_type() {
  ask "--zone=$zone: its accelerator types cannot be read" gcloud compute tpus accelerator-types list \
    "${where[@]}" --filter="type=$type" '--format=value(type)'
  [[ $dry_run == true || -n $answer ]] || fail "--type=$type: is not offered in --zone=$zone; see: \
gcloud compute tpus accelerator-types list --zone=$zone"
  found "type: $type is offered in $zone"
}

# check_quota CHIPS: the project may have that many chips of the type in the zone; a quota of -1 is no limit. Quotas
# that cannot be read are a warning: a request beyond a quota is refused later, and costs nothing. Those of v4 and v5p
# may count cores, two for each chip, so that a quota below CHIPS is too small in any case.
check_quota() {
  local chips=$1 quota limit="" spot_word=""
  [[ $spot == false ]] || spot_word=Preemptible
  [[ $reserved == false ]] || return 0  # A reservation has its own quota, which Google sets.
  case $type in
    v4-*) quota="TPUV4s${spot_word}Pod" ;;
    v5litepod-[148]) quota="TPUV5s${spot_word}LitepodServing" ;;
    v5litepod-*) quota="TPUV5s${spot_word}Litepod" ;;
    v5p-*) quota="TPUV5P${spot_word}" ;;
    v6e-*) quota="TPUV6E${spot_word}" ;;
    *) return 0 ;;
  esac
  quota+=PerProjectPerZoneForTPUAPI
  # One line for each zone with a value of its own, and one without a zone for all others.
  local look=(gcloud quotas info describe "$quota" --service=tpu.googleapis.com "--project=$project" \
    '--flatten=dimensionsInfos[]' \
    '--format=csv[no-heading](dimensionsInfos.dimensions.zone,dimensionsInfos.details.value)')
  if [[ $dry_run == true ]]; then
    quoted "${look[@]}"
    return
  fi
  if answer=$("${look[@]}" 2> /dev/null); then
    limit=$(awk -F, -v zone="$zone" '
      $1 == zone { own = 1; value = $2 + 0 }
      $1 == "" && !own && $2 != "" { value = $2 }
      END { print value }' <<< "$answer")
  fi
  if [[ -z $limit ]]; then
    note "warning: the quota $quota cannot be read; gcloud services enable cloudquotas.googleapis.com lets it be read"
  elif ((limit == -1)); then
    found "quota: no limit in $zone, $chips needed"
  elif ((limit < chips)); then
    fail "--type=$type: needs $chips chips, and the quota $quota of $project in $zone is $limit; request more at \
https://console.cloud.google.com/iam-admin/quotas"
  else
    found "quota: $limit in $zone, $chips needed"
  fi
}

# check_data: the data set and the image features will be staged from --data_dir, or are in the bucket. Workers that make
# features write them beside the data set, which they read in the bucket, so it must be prepared.
check_data() {
  local folder raw_dir=$raw_dir
  if [[ $command == features ]]; then
    embedded=false features="" raw_dir=""
  fi
  if [[ $embedded == true ]]; then
    found "data: $dataset is part of the package"
    return
  fi
  for folder in "$dataset" ${features:+"${dataset}_features/$features"}; do
    if [[ -n $data_dir ]]; then
      [[ -d $data_dir/$folder || ($folder == "$dataset" && -n $raw_dir) ]] \
        || fail "--data_dir=$data_dir: has no $folder; prepare it on this machine, see launch/README.md"
      found "data: $data_dir/$folder will be staged"
    elif [[ $folder == "$dataset" && -n $raw_dir ]]; then
      found "data: every worker prepares $dataset from $raw_dir, because --data_dir is not given"
    else
      ask "--data_dir: must be given, because gs://$bucket/data has no $folder" \
        gcloud storage ls "gs://$bucket/data/$folder/"
      found "data: gs://$bucket/data/$folder"
    fi
  done
}

# check_weights: the weights will be staged, are in the bucket, or are not a folder of this machine.
check_weights() {
  local name problem
  if [[ -n $weights && -d $weights && $stages == true ]]; then
    found "weights: $weights will be staged"
  elif [[ -n $weights ]]; then
    name=$(basename -- "$weights")
    problem="--weights=$weights: is no folder of this machine, and gs://$bucket/weights has no $name"
    [[ $stages == true ]] || problem="--weights=$weights: gs://$bucket/weights has no $name; stage it first"
    ask "$problem" gcloud storage ls "gs://$bucket/weights/$name/"
    found "weights: gs://$bucket/weights/$name"
  elif [[ -e $pretrained || $pretrained == /* || $pretrained == .* ]]; then
    fail "--config.encoder.pretrained=$pretrained: is a path of this machine; give it as --weights=$pretrained before --"
  elif [[ $pretrained == package:* ]]; then
    found "weights: $pretrained, which must be installed on every worker"
  else
    found "weights: every worker downloads $pretrained; --weights=FOLDER would stage them"
  fi
}

# check_inputs: the bucket has what the command reads, or will have it after staging.
check_inputs() {
  local name value
  case $command in
    train) check_data; check_weights ;;
    evaluate)
      check_run "gs://$bucket/runs/$run" checkpoints/
      [[ -z $dataset ]] || check_data
      ;;
    predict) value_of workdir; check_run "$value" checkpoints/ inference.json index/CURRENT ;;
    encode) value_of workdir; check_run "$value" checkpoints/ inference.json ;;
    features) check_data ;;
  esac
  [[ $command != train ]] || return 0
  for name in queries checkpoint image_checkpoint; do
    value_of "$name"
    if [[ $value == gs://* ]]; then
      ask "--$name=$value: no such file or folder" gcloud storage ls "$value"
      found "$name: $value"
    elif [[ -n $value ]]; then
      found "$name: every worker downloads $value"
    fi
  done
  ! answers_queries || check_output
}

# check_run PLACE NAME...: the run at this address has its config and these files; its frozen encoder is staged.
check_run() {
  local place=${1%/} name
  shift
  ask "$place: has no config.json; it must be the workdir of a run" gcloud storage cat "$place/config.json"
  for name in "$@"; do
    local stored=$answer
    ask "$place: has no $name; vixml evaluate writes it again, if there is a checkpoint" \
      gcloud storage ls "$place/$name"
    answer=$stored
  done
  [[ $dry_run == false ]] || return 0
  read_config "$answer"
  found "run: $place"
  check_frozen
}

# check_frozen: a run that trained adapters reads its encoder again, from the path of training; evaluation always does.
check_frozen() {
  local name=${pretrained##*/}
  if [[ ($frozen != true && $command != evaluate) || ($pretrained != /* && $pretrained != .*) ]]; then
    return 0
  elif [[ $pretrained != */vixml/weights/"$name" ]]; then
    note "warning: the run reads its frozen encoder from $pretrained, which every worker must have"
  elif [[ $stages == true && -d $weights && $(basename -- "$weights") == "$name" ]]; then
    found "weights: $weights will be staged"
  elif [[ $stages == false && ($weights == "" || $(basename -- "$weights") != "$name") ]]; then
    fail "--weights: must be --weights=$name, because every worker reads the encoder of the run, which is not trained"
  else
    ask "--weights: must be given, because the run reads its encoder $name, and gs://$bucket/weights does not have it" \
      gcloud storage ls "gs://$bucket/weights/$name/"
    found "weights: gs://$bucket/weights/$name"
  fi
}

# check_output: says what happens to a result that exists. Workers try to write to the bucket when they are set up.
check_output() {
  local look
  value_of output
  look=(gcloud storage ls "$value")
  if [[ $dry_run == true ]]; then
    quoted "${look[@]}"
  elif "${look[@]}" > /dev/null 2>&1; then
    note "warning: $value exists; if it is the result of another command, predict replaces it and encode refuses it"
  else
    found "output: $value"
  fi
}

# data_folders: prints the folders of --data_dir that the config needs, one a line: data set, features, cached tokens.
data_folders() {
  local folder
  printf '%s\n' "$dataset" ${features:+"${dataset}_features/$features"}
  for folder in "$data_dir"/tokens/"$dataset"-* "$data_dir"/feature_banks/"$dataset"-*; do
    [[ ! -d $folder ]] || printf '%s\n' "${folder#"$data_dir"/}"
  done
}

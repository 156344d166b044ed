# shellcheck shell=bash disable=SC2154
# Checks of a launch before anything is bought, to be sourced after common.sh. Each prints what it found, or exits with
# one line that says what to do. They only read. The variables are those of the launcher's flags. --dry-run prints their
# commands, except that of read_config.

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

# read_config: sets `dataset`, `embedded`, `features` and `pretrained` from the training flags, which are checked as
# training checks them. It runs on this machine and sends nothing.
read_config() {
  local lines name value
  [[ -x $(command -v "$python") ]] || fail "--python=$python: cannot be run; it must be a Python with vixml_jax, which \
reads the config before anything is bought"
  lines=$(JAX_PLATFORMS=cpu "$python" "$root/launch/read_config.py" "${arguments[@]}") || exit 1
  dataset="" embedded="" features="" pretrained=""
  while IFS='=' read -r name value; do
    case $name in
      dataset | embedded | features | pretrained) printf -v "$name" '%s' "$value" ;;
    esac
  done <<< "$lines"
  [[ -n $dataset ]] || fail "--python=$python: did not print the data set of the config"
  found "config: data set $dataset${features:+, image features $features}, encoder $pretrained"
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
  local command=(gcloud quotas info describe "$quota" --service=tpu.googleapis.com "--project=$project" \
    '--flatten=dimensionsInfos[]' \
    '--format=csv[no-heading](dimensionsInfos.dimensions.zone,dimensionsInfos.details.value)')
  if [[ $dry_run == true ]]; then
    quoted "${command[@]}"
    return
  fi
  if answer=$("${command[@]}" 2> /dev/null); then
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

# check_data: the data set and the image features will be staged from --data_dir, or are in the bucket.
check_data() {
  local folder
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
  local name
  if [[ -n $weights && -d $weights ]]; then
    found "weights: $weights will be staged"
  elif [[ -n $weights ]]; then
    name=$(basename -- "$weights")
    ask "--weights=$weights: is no folder of this machine, and gs://$bucket/weights has no $name" \
      gcloud storage ls "gs://$bucket/weights/$name/"
    found "weights: gs://$bucket/weights/$name"
  elif [[ -e $pretrained || $pretrained == /* || $pretrained == .* ]]; then
    fail "--config.encoder.pretrained=$pretrained: is a path of this machine; give it as --weights=$pretrained before --"
  elif [[ $pretrained == package:* ]]; then
    found "weights: $pretrained, which must be installed on every worker"
  else
    found "weights: every worker downloads $pretrained; --weights=FOLDER would stage them"
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

# shellcheck shell=bash
# Functions that the launchers share, to be sourced: flags, one-line errors, and commands that --dry-run only prints.

# shellcheck disable=SC2034  # The launchers read these variables.
{
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  dry_run=false
  command=${VIXML_COMMAND:-train}
  arguments=()
}

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

note() {
  printf '%s %s\n' "$(date +%H:%M:%S)" "$*" >&2
}

# quoted WORD...: prints one line that a shell parses into these words.
quoted() {
  local word line=""
  for word in "$@"; do
    if [[ ! $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]]; then
      word="'${word//\'/\'\\\'\'}'"
    fi
    line+="$word "
  done
  printf '%s\n' "${line% }"
}

# execute COMMAND...: runs the command; with --dry-run, prints it.
execute() {
  if [[ $dry_run == true ]]; then
    quoted "$@"
  else
    "$@"
  fi
}

# usage: prints the comment at the top of the script.
usage() {
  sed -n '2,/^$/{s/^# \{0,1\}//p}' "$0"
}

# parse_flags "VALUES" "SWITCHES" ARGUMENT...: sets the variable of each flag, and `arguments` to the words after --.
# Dashes and underscores in flag names are equivalent. Local names start with _, so that they hide no flag's variable.
# A flag of the launcher after -- is refused: --dry-run there would start a real run. Only --name of features is not that
# of a launcher.
parse_flags() {
  local _values=" $1 " _switches=" $2 " _flag _name
  shift 2
  while (($#)); do
    _flag=${1%%=*}
    _name=${_flag#--}
    _name=${_name//-/_}
    case $1 in
      --)
        shift
        arguments=("$@")
        refuse_own_flags "$_values$_switches help "
        return
        ;;
      --help) usage; exit 0 ;;
      --*=*)
        [[ $_values == *" $_name "* ]] || fail "$_flag: no such flag with a value; --help lists them"
        printf -v "$_name" '%s' "${1#*=}"
        ;;
      --*)
        [[ $_values != *" $_name "* ]] || fail "$_flag: needs a value: $_flag=..."
        [[ $_switches == *" $_name "* ]] \
          || fail "$_flag: no such flag; --help lists them; flags of the command go after --"
        printf -v "$_name" true
        ;;
      *) fail "'$1': not a flag; flags start with --" ;;
    esac
    shift
  done
}

# spoken: prints what errors call the command.
spoken() {
  if [[ $command == train ]]; then
    echo training
  else
    echo "$command"
  fi
}

# refuse_own_flags " NAME NAME ... ": exits with an error if a word after -- is one of these flags.
refuse_own_flags() {
  local _word _flag _name _allowed=""
  [[ $command != features ]] || _allowed=name  # The name of the features.
  for _word in ${arguments[@]+"${arguments[@]}"}; do
    [[ $_word == -* ]] || continue
    _flag=${_word%%=*}
    _name=${_flag#-}
    _name=${_name#-}
    [[ $1 != *" ${_name//-/_} "* || $_name == "$_allowed" ]] \
      || fail "$_flag: is a flag of $(basename "$0"), not of $(spoken); put it before --"
  done
}

# need NAME...: exits with an error unless each of these flags has a value.
need() {
  local _name
  for _name in "$@"; do
    [[ -n ${!_name} ]] || fail "--$_name: must be given, or VIXML_${_name^^} must be set in the environment"
  done
}

# need_number NAME...: exits with an error if one of these flags is not a whole number.
need_number() {
  local _name
  for _name in "$@"; do
    [[ ${!_name} =~ ^(0|[1-9][0-9]*)$ ]] || fail "--$_name=${!_name}: must be a whole number"
  done
}

# need_decimal NAME...: exits with an error if one of these flags is not a number above 0; empty flags are skipped.
need_decimal() {
  local _name
  for _name in "$@"; do
    [[ -z ${!_name} ]] || [[ ${!_name} =~ ^[0-9]+(\.[0-9]+)?$ && ${!_name} =~ [1-9] ]] \
      || fail "--$_name=${!_name}: must be a number above 0, such as 12 or 1.5"
  done
}

# need_name NAME...: exits with an error if one of these flags cannot be a name; empty flags are skipped. Cloud Storage
# would expand a wildcard: with --run='*', removing the states of a run would remove those of every run.
need_name() {
  local _name
  for _name in "$@"; do
    [[ -z ${!_name} || ${!_name} =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]] \
      || fail "--$_name=${!_name}: must be letters, digits, '.', '_' and '-', and start with a letter or digit"
  done
}

# need_config: exits with an error if the training flags lack a config, or contain a flag that the launcher sets or that
# training does not have.
need_config() {
  local argument found=false
  for argument in ${arguments[@]+"${arguments[@]}"}; do
    case $argument in
      --config=?*) found=true ;;
      --workdir=* | --distributed | --config.dataset.data_dir=*)
        fail "${argument%%=*}: is set by the launcher; leave it out" ;;
      --config.?* | --noconfig.?*) ;;
      *) fail "'$argument': is not a training flag; after -- there are --config=FILE and --config.KEY=VALUE" ;;
    esac
  done
  [[ $found == true ]] || fail "--config: must be given after --, as in: -- --config=configs/lf_amazon_1.3m.py"
}

# need_folder NAME...: exits with an error if one of these flags names no folder; empty flags are skipped.
need_folder() {
  local _name
  for _name in "$@"; do
    [[ -z ${!_name} || -d ${!_name} ]] || fail "--$_name=${!_name}: no such folder"
    need_plain_name "$_name"
  done
}

# need_plain_name NAME: exits with an error if the last part of this flag, a path, cannot be part of an address in the
# bucket, in which wildcards would be expanded, or of FROM:TO of train_worker.sh.
need_plain_name() {
  [[ $(basename -- "${!1:-x}") != *[][*?:]* ]] || fail "--$1=${!1}: its name must not contain *, ?, :, [ or ]"
}

# later HOURS: prints the time in HOURS hours, in seconds since 1970; nothing if HOURS is empty.
later() {
  [[ -z $1 ]] || awk -v now="$(date +%s)" -v hours="$1" 'BEGIN { printf "%d\n", now + hours * 3600 }'
}

# announce_cost CHIPS HOURS PRICE [END]: prints what the chips cost at most. HOURS and PRICE may be empty. Without
# HOURS, END says when the cost ends. There is no table of prices here: they differ by region, by contract and by day.
announce_cost() {
  local chips=$1 hours=$2 price=$3 end="${4:-without --max_hours there is no limit}" told
  told="$chips chips"
  [[ -z $hours ]] || told+=$(awk -v c="$chips" -v h="$hours" 'BEGIN { printf ", at most %.6g chip-hours", c * h }')
  if [[ -n $price ]]; then
    told+=$(awk -v c="$chips" -v h="$hours" -v p="$price" 'BEGIN {
      printf ", %.2f an hour", c * p; if (h != "") printf ", at most %.2f in total", c * h * p }')
  else
    told+="; --price_per_chip_hour prints the cost, see https://cloud.google.com/tpu/pricing"
  fi
  [[ -n $hours ]] || told+="; $end"
  note "cost: $told"
}

# stage_folders BUCKET DATA_DIR RAW_DIR WEIGHTS FOLDER...: copies new and changed files to the bucket: of DATA_DIR the
# given folders, or all of it if none is given; of RAW_DIR and WEIGHTS everything.
stage_folders() {
  local bucket=$1 data_dir=$2 raw_dir=$3 weights=$4 folder
  local sync=(gcloud storage rsync --recursive) data=(gcloud storage rsync --recursive)
  data+=(--exclude='.*\.lock$|.*\.incomplete.*')
  shift 4
  if [[ -n $data_dir && $# == 0 ]]; then
    execute "${data[@]}" "$data_dir" "gs://$bucket/data"
  elif [[ -n $data_dir ]]; then
    for folder in "$@"; do
      [[ ! -d $data_dir/$folder ]] || execute "${data[@]}" "$data_dir/$folder" "gs://$bucket/data/$folder"
    done
  fi
  if [[ -n $raw_dir ]]; then
    execute "${sync[@]}" "$raw_dir" "gs://$bucket/raw"
  fi
  if [[ -n $weights ]]; then
    execute "${sync[@]}" "$weights" "gs://$bucket/weights/$(basename -- "$weights")"
  fi
}

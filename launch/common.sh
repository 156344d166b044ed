# shellcheck shell=bash
# Functions that the launchers share, to be sourced: flags, one-line errors, and commands that --dry-run only prints.

# shellcheck disable=SC2034  # The launchers read these variables.
{
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  dry_run=false
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
          || fail "$_flag: no such flag; --help lists them; training flags go after --"
        printf -v "$_name" true
        ;;
      *) fail "'$1': not a flag; flags start with --" ;;
    esac
    shift
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
    [[ ${!_name} =~ ^[0-9]+$ ]] || fail "--$_name=${!_name}: must be a whole number"
  done
}

# need_config: exits with an error if the training flags lack a config, or contain a flag that the launcher sets.
need_config() {
  local argument found=false
  for argument in ${arguments[@]+"${arguments[@]}"}; do
    case $argument in
      --config=*) found=true ;;
      --workdir=* | --distributed | --config.dataset.data_dir=*)
        fail "${argument%%=*}: is set by the launcher; leave it out" ;;
    esac
  done
  [[ $found == true ]] || fail "--config: must be given after --, as in: -- --config=configs/lf_amazon_1.3m.py"
}

# need_folder NAME...: exits with an error if one of these flags names no folder; empty flags are skipped.
need_folder() {
  local _name
  for _name in "$@"; do
    [[ -z ${!_name} || -d ${!_name} ]] || fail "--$_name=${!_name}: no such folder"
  done
}

# stage_folders BUCKET DATA_DIR RAW_DIR WEIGHTS: copies new and changed files of each folder to the bucket.
stage_folders() {
  local bucket=$1 data_dir=$2 raw_dir=$3 weights=$4
  local sync=(gcloud storage rsync --recursive)
  if [[ -n $data_dir ]]; then
    execute "${sync[@]}" --exclude='.*\.lock$|.*\.incomplete.*' "$data_dir" "gs://$bucket/data"
  fi
  if [[ -n $raw_dir ]]; then
    execute "${sync[@]}" "$raw_dir" "gs://$bucket/raw"
  fi
  if [[ -n $weights ]]; then
    execute "${sync[@]}" "$weights" "gs://$bucket/weights/$(basename "$weights")"
  fi
}

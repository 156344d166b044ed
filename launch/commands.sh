# shellcheck shell=bash
# The commands that launchers start on all workers, to be sourced after common.sh: --command and the flags after --.
# shellcheck disable=SC2034,SC2154  # common.sh and the launchers set and read these variables.

# need_command: exits with an error unless --command is a command whose processes share its work. Sets `module`, the
# module of vixml_jax that is started.
need_command() {
  case $command in
    train) module=main ;;
    evaluate | predict | encode) module=$command ;;
    features) module=extract_features ;;
    *) fail "--command=$command: must be train, evaluate, predict, encode or features; others run in one process" ;;
  esac
}

# writes_run: whether the command writes to the workdir of a run; the others only need a place for their logs.
writes_run() {
  [[ $command == train || $command == evaluate ]]
}

# answers_queries: whether the command reads a trained workdir and a file, and writes a result that it names.
answers_queries() {
  [[ $command == predict || $command == encode ]]
}

# value_of NAME: sets `value` to that of the flag NAME after --, or to nothing.
value_of() {
  local _argument
  value=""
  for _argument in ${arguments[@]+"${arguments[@]}"}; do
    [[ $_argument != "--$1="* ]] || value=${_argument#*=}
  done
}

# need_value NAME: sets `value` as value_of does, and exits with an error if there is none.
need_value() {
  value_of "$1"
  [[ -n $value ]] || fail "--$1: must be given after --, as in: -- --$1=..."
}

# need_flags: exits with an error if the flags after -- cannot be those of the command, or are set by the launcher.
need_flags() {
  local argument
  if [[ $command == train ]]; then
    need_config
    return
  fi
  for argument in ${arguments[@]+"${arguments[@]}"}; do
    case $argument in
      --distributed | --coordinator=* | --num_processes=* | --process=* | --config.dataset.data_dir=* | --data_dir=*)
        fail "${argument%%=*}: is set by the launcher; leave it out" ;;
      --workdir=*) answers_queries || fail "--workdir: is set by the launcher; leave it out" ;;
      --compare | --compare=* | --verify | --published=* | --data=*)
        fail "${argument%%=*}: runs in one process; run vixml $command ${argument%%=*} on one machine" ;;
      --?*) ;;
      *) fail "'$argument': is not a flag of $command; after -- there are words such as --NAME=VALUE" ;;
    esac
  done
  if [[ $command == features ]]; then
    need_value config
    need_value checkpoint
  elif answers_queries; then
    need_suffix queries
    need_value output
    [[ $command == encode ]] || need_suffix output
  fi
}

# need_suffix NAME: exits with an error unless the flag NAME after -- is a file of queries or predictions.
need_suffix() {
  need_value "$1"
  case $value in
    *.jsonl | *.csv | *.parquet) ;;
    *) fail "--$1=$value: must end in .jsonl, .csv or .parquet" ;;
  esac
}

# need_places: exits with an error if a file or folder that a flag after -- names is not where the workers find it: in
# the bucket, which they mount. Other values, such as names on the hub, may be given as they are.
need_places() {
  local argument name value
  [[ $command != train ]] || return 0
  if answers_queries; then
    for name in workdir queries output; do
      need_value "$name"
      [[ $value == "gs://$bucket/"?* ]] || fail "--$name=$value: must be in the bucket, as gs://$bucket/..."
      [[ $value != *[][*?]* ]] || fail "--$name=$value: must not contain *, ?, [ or ]"
    done
  fi
  for argument in ${arguments[@]+"${arguments[@]}"}; do
    name=${argument%%=*} value=${argument#*=}
    case $argument in
      --*="gs://$bucket/"?*) ;;
      --*=gs://*) fail "$argument: must be in the bucket that the workers mount, gs://$bucket/..." ;;
      --checkpoint=[/.~]* | --image_checkpoint=[/.~]* | --images=[/.~]*)
        fail "$argument: is a path of this machine; copy it to the bucket, and give it as $name=gs://$bucket/..." ;;
    esac
  done
}

# mount_arguments WORDS MOUNT: replaces the bucket in the array WORDS of flags by the folder in which workers mount it.
mount_arguments() {
  local -n _words=$1
  local _index _start
  [[ $command != train ]] || return 0
  for _index in ${_words[@]+"${!_words[@]}"}; do
    _start="${_words[_index]%%=*}=gs://$bucket/"
    [[ ${_words[_index]} != "$_start"* ]] || _words[_index]="${_start%%=*}=$2/${_words[_index]#"$_start"}"
  done
}

# output_folder ADDRESS: prints the folder of the bucket that contains it, without the bucket; nothing for the bucket.
output_folder() {
  local path=${1#"gs://$bucket/"}
  path=${path%/}
  [[ $path != */* ]] || echo "${path%/*}"
}

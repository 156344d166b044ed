#!/usr/bin/env bash
# Runs one process of a training run, or of another command: forwards SIGTERM, copies its files to a shared folder, and
# records how it ended.
#
#   launch/train_worker.sh --workdir=DIR|--job=DIR [--store=DIR] [--state=DIR] [--name=NAME] [--copy=FROM:TO ...] \
#     [--make=DIR ...] -- COMMAND...
#
#   --workdir  folder that the run writes to; passed to COMMAND as its last flag
#   --job      instead of --workdir, for a COMMAND that writes its result elsewhere: a folder for its log and its state
#   --store    folder of the run that all workers see, such as a mounted bucket. All workers write their parts
#              of checkpoints and embeddings there. The other files are written to --workdir, which is local, and copied
#              to the store every minute and at the end. An empty local workdir is filled from the store first. Omit the
#              flag if --workdir is shared.
#   --state    folder of the word that says how the run ended; by default `state` in the store or the workdir
#   --name     name of this worker, for logs/NAME.log and state/NAME; by default worker-NUMBER on GKE and SLURM,
#              and worker-SLICE-NUMBER with several slices
#   --copy     copies missing and changed files of folder FROM to folder TO before the run
#   --make     makes a folder before the run
#   --deadline time in seconds since 1970 at which the run gets SIGTERM, saves a checkpoint and is not started again
#
# Word in state/NAME, with the exit status:
#   running        the run is in progress
#   finished, 0    the command has finished
#   failed, 1      bad input; another start cannot help
#   expired, 3     saved at the deadline, or started after it; another start needs another deadline
#   again, 42      saved after SIGTERM, or crashed, perhaps because another worker did; start it again

set -euo pipefail

publish_seconds=${VIXML_PUBLISH_SECONDS:-60}
workdir="" job="" store="" state="" copies=() folders=() deadline=""
# Workers of several slices have the same numbers; a slice is told by its own.
name=worker-${MEGASCALE_SLICE_ID:+$MEGASCALE_SLICE_ID-}${JOB_COMPLETION_INDEX:-${SLURM_PROCID:-$HOSTNAME}}

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

while (($#)); do
  case $1 in
    --workdir=*) workdir=${1#*=} ;;
    --job=*) job=${1#*=} ;;
    --store=*) store=${1#*=} ;;
    --state=*) state=${1#*=} ;;
    --name=*) name=${1#*=} ;;
    --deadline=*) deadline=${1#*=} ;;
    --copy=*:*) copies+=("${1#*=}") ;;
    --make=*) folders+=("${1#*=}") ;;
    --) shift; break ;;
    *) fail "'$1': no such flag; see the head of $0" ;;
  esac
  shift
done
[[ -z $workdir || -z $job ]] || fail "--job: must not be given with --workdir"
[[ -n $workdir$job ]] || fail "--workdir: must be given, or --job for a command that writes its result elsewhere"
(($#)) || fail "COMMAND: must be given after --"
[[ $deadline =~ ^[0-9]*$ ]] || fail "--deadline=$deadline: must be a whole number"

# Copies the small files of the store to the workdir. Checkpoints and embeddings stay in the store; old logs and states
# are not read here.
restore() {
  cd "$store"
  find . \( -path ./checkpoints -o -path ./embeddings -o -path ./logs -o -path ./state \) -prune -o -type f \
    -exec cp --parents -t "$workdir" {} +
}

# Copies files that have changed since the last call. `find` does not follow the links into the store. Commands of a
# process that was killed during a call may still run, so the next call has a file of its own.
publish() {
  local next=$published.next.$BASHPID
  touch "$next"
  (cd "$workdir" && find . -type f -newer "$published" ! -name '*.partial' ! -path '*.incomplete*' \
    ! -name '.published*' \
    -exec cp --parents -t "$store" {} +) || echo "$name: could not copy $workdir to $store; will try again" >&2
  mv "$next" "$published"
}

publish_for_ever() {
  while sleep "$publish_seconds" > /dev/null 2>&1; do
    publish
  done
}

say() {
  echo "$1" > "$state/$name"
}

# Prints how the run ended, from its exit status $1 and the lines of its log from line $2 on. An entry point exits with
# 0 when it has finished, with 143 after SIGTERM, with 75 when another process was lost, and with 1 both for bad input
# and for a bug; only bad input prints a line that starts with "error:".
outcome() {
  local status=$1 said
  said=$(tail -n "+$2" "$log")
  if ((status == 0)); then
    echo finished
  elif ((status == 1)) && grep -q '^error: ' <<< "$said"; then
    echo failed
  else
    echo again
  fi
}

for folder in "${workdir:-$job}" ${store:+"$store"} ${folders[@]+"${folders[@]}"}; do
  mkdir -p -- "$folder"
done
passed=()
if [[ -n $job ]]; then
  workdir=$(cd "$job" && pwd)
else
  workdir=$(cd "$workdir" && pwd)
  passed=("--workdir=$workdir")
fi
published=$workdir/.published
if [[ -n $store ]]; then
  store=$(cd "$store" && pwd)
fi
if [[ -n $store && -z $job ]]; then
  mkdir -p "$store/checkpoints" "$store/embeddings"
  if [[ ! -e $workdir/config.json ]]; then
    (restore)
  fi
  # The first worker reads the embeddings of all. A local folder is that of an earlier version, which copied its files to
  # the store.
  [[ -L $workdir/embeddings ]] || rm -rf -- "$workdir/embeddings"
  ln -sfn "$store/checkpoints" "$workdir/checkpoints"
  ln -sfn "$store/embeddings" "$workdir/embeddings"
fi
[[ -z $store ]] || touch "$published"  # After `restore`, whose files need not be copied back.
state=${state:-${store:-$workdir}/state}
mkdir -p "$workdir/logs" "$state"
log=$workdir/logs/$name.log
touch "$log"
say running
if [[ -n $deadline ]] && (($(date +%s) >= deadline)); then
  echo "$name: expired, because its deadline has passed" >&2
  say expired
  exit 3
fi

for pair in ${copies[@]+"${copies[@]}"}; do
  mkdir -p "${pair#*:}"
  cp --recursive --update --no-target-directory "${pair%%:*}" "${pair#*:}"
done

first_line=$(($(wc -l < "$log") + 1))
# Schedulers may send SIGTERM to every process of a job. The process that writes the log must outlive the run.
exec {output}> >(trap '' TERM; exec tee -a "$log")
logger=$!
asked=false
trap 'asked=true; kill -TERM "$child" 2> /dev/null || true' TERM
"$@" ${passed[@]+"${passed[@]}"} >&"$output" 2>&1 {output}>&- &
child=$!
exec {output}>&-
alarm="" expired=false
if [[ -n $deadline ]]; then
  trap 'expired=true asked=true; kill -TERM "$child" 2> /dev/null || true' USR1
  (
    trap 'kill "$sleeper"' TERM
    sleep "$((deadline - $(date +%s)))" > /dev/null 2>&1 &
    sleeper=$!
    wait "$sleeper" && kill -USR1 $$
  ) &
  alarm=$!
fi
publisher=""
if [[ -n $store ]]; then
  publish_for_ever &
  publisher=$!
fi

status=0
wait "$child" || status=$?
while [[ $asked == true ]]; do  # The signal ended `wait` but not the run.
  asked=false
  status=0
  wait "$child" || status=$?
done
wait "$logger" || true
if [[ -n $publisher ]]; then
  kill "$publisher" 2> /dev/null || true
  wait "$publisher" 2> /dev/null || true
  publish
fi

if [[ -n $alarm ]]; then
  kill "$alarm" 2> /dev/null || true
fi
ended=$(outcome "$status" "$first_line")
if [[ $ended == again && $expired == true ]]; then
  ended=expired
fi
echo "$name: $ended (exit status $status)" >&2
say "$ended"
case $ended in
  finished) exit 0 ;;
  failed) exit 1 ;;
  expired) exit 3 ;;
  *) exit 42 ;;  # By default, xpk restarts a workload after this status.
esac

#!/usr/bin/env bash
# Runs one process of a training run, hands SIGTERM on to it, keeps a shared copy of what it writes, says how it ended.
#
#   launch/train_worker.sh --workdir=DIR [--store=DIR] [--name=NAME] [--copy=FROM:TO ...] -- COMMAND...
#
#   --workdir  where the run writes; COMMAND gets it as its last flag
#   --store    folder of the run that all workers see, such as a mounted bucket. Checkpoints are written there by all
#              workers; the other files are written to --workdir, which is local, and copied every minute and at the
#              end. A local workdir that is empty is filled from there first. Leave it out where --workdir is shared.
#   --name     of this worker, in logs/NAME.log and state/NAME; by default worker-NUMBER on GKE and SLURM
#   --copy     before the run, copies what is missing of folder FROM to folder TO
#
# Exit status, and word in state/NAME while and after: running; 0 finished; 1 failed: bad input, starting again will
# not help; 42 again: saved after SIGTERM, or crashed, perhaps because another worker did. Start it again.

set -euo pipefail

publish_seconds=${VIXML_PUBLISH_SECONDS:-60}
workdir="" store="" copies=()
name=worker-${JOB_COMPLETION_INDEX:-${SLURM_PROCID:-$HOSTNAME}}

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

while (($#)); do
  case $1 in
    --workdir=*) workdir=${1#*=} ;;
    --store=*) store=${1#*=} ;;
    --name=*) name=${1#*=} ;;
    --copy=*:*) copies+=("${1#*=}") ;;
    --) shift; break ;;
    *) fail "'$1': no such flag; see the head of $0" ;;
  esac
  shift
done
[[ -n $workdir ]] || fail "--workdir: must be given"
(($#)) || fail "COMMAND: must be given after --"

# Small files only: checkpoints stay where they are, and nobody reads old embeddings, logs and states here.
restore() {
  cd "$store"
  find . \( -path ./checkpoints -o -path ./embeddings -o -path ./logs -o -path ./state \) -prune -o -type f \
    -exec cp --parents -t "$workdir" {} +
}

# Copies what has changed since the last time; `find` does not follow the link to the checkpoints.
publish() {
  touch "$published.next"
  (cd "$workdir" && find . -type f -newer "$published" ! -name '*.partial' ! -path '*.incomplete*' \
    ! -name '.published*' \
    -exec cp --parents -t "$store" {} +) || echo "$name: could not copy $workdir to $store; next try later" >&2
  mv "$published.next" "$published"
}

publish_for_ever() {
  while sleep "$publish_seconds" > /dev/null 2>&1; do
    publish
  done
}

say() {
  echo "$1" > "${store:-$workdir}/state/$name"
}

# How the run ended, from its exit status and what it said since line $2 of its log. An entry point exits with 0 also
# when it was preempted, and with 1 for bad input as for a bug; the former it tells in a line that begins with error:.
outcome() {
  local status=$1 said
  said=$(tail -n "+$2" "$log")
  if ((status == 0)) && ! grep -q '^saved step .*start the same command again' <<< "$said"; then
    echo finished
  elif ((status == 1)) && grep -q '^error: ' <<< "$said"; then
    echo failed
  else
    echo again
  fi
}

mkdir -p "$workdir"
workdir=$(cd "$workdir" && pwd)
published=$workdir/.published
if [[ -n $store ]]; then
  mkdir -p "$store/checkpoints" "$store/state"
  store=$(cd "$store" && pwd)
  if [[ ! -e $workdir/config.json ]]; then
    (restore)
  fi
  ln -sfn "$store/checkpoints" "$workdir/checkpoints"
  touch "$published"
fi
mkdir -p "$workdir/logs" "$workdir/state"
log=$workdir/logs/$name.log
touch "$log"
say running

for pair in ${copies[@]+"${copies[@]}"}; do
  mkdir -p "${pair#*:}"
  cp --recursive --update --no-target-directory "${pair%%:*}" "${pair#*:}"
done

first_line=$(($(wc -l < "$log") + 1))
# Schedulers may send SIGTERM to every process of a job; the log must outlive the run.
exec {output}> >(trap '' TERM; exec tee -a "$log")
logger=$!
asked=false
trap 'asked=true; kill -TERM "$child" 2> /dev/null || true' TERM
"$@" --workdir="$workdir" >&"$output" 2>&1 {output}>&- &
child=$!
exec {output}>&-
publisher=""
if [[ -n $store ]]; then
  publish_for_ever &
  publisher=$!
fi

status=0
wait "$child" || status=$?
while [[ $asked == true ]]; do  # The signal ended `wait`, not the run.
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

ended=$(outcome "$status" "$first_line")
echo "$name: $ended (exit status $status)" >&2
say "$ended"
case $ended in
  finished) exit 0 ;;
  failed) exit 1 ;;
  *) exit 42 ;;  # One of those at which xpk restarts a workload by default.
esac

#!/usr/bin/env bash
# Script that tpu_pod.sh runs on each worker of a pod, from the code that it copied to ~/vixml/code.
#
#   tpu_worker.sh setup BUCKET [NAME...]   mounts the bucket at ~/vixml/bucket, copies these of its folders data, raw and
#                                          weights, by default all, and installs Python packages
#   tpu_worker.sh start RUN [--module=MODULE] [--weights=NAME] [--deadline=SECONDS] [--compile_cache=FOLDER]
#       [--make=FOLDER] -- FLAGS...        starts vixml_jax.MODULE, by default main, which trains, as a service; stops
#                                          one that is in progress. FOLDER is in the bucket
#   tpu_worker.sh stop                     sends SIGTERM, on which training saves a checkpoint

set -euo pipefail

home=$HOME/vixml
code=$home/code

# Key with which Google signs packages.cloud.google.com. Only packages that it has signed are trusted, whatever other
# keys the downloaded file has.
google_key=35BAA0B33E9EB396F59CA838C0BA5CE6DC6315A3

# install_key FILE: downloads Google's keys and writes the one with the known fingerprint to FILE.
install_key() {
  local work
  work=$(mktemp -d)
  curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg > "$work/keys"
  gpg --homedir "$work" --batch --quiet --import "$work/keys"
  gpg --homedir "$work" --batch --armor --export "$google_key" > "$work/key"
  if [[ ! -s $work/key ]]; then
    rm -r "$work"
    echo "error: packages.cloud.google.com: its keys do not include $google_key; see google_key in $0" >&2
    exit 1
  fi
  sudo install --mode=644 "$work/key" "$1"
  rm -r "$work"
}

install_gcsfuse() {
  if command -v gcsfuse > /dev/null; then
    return
  fi
  local key=/usr/share/keyrings/cloud.google.asc
  install_key "$key"
  echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" \
    | sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null
  # A new machine upgrades itself and holds the lock for some minutes.
  sudo apt-get -o DPkg::Lock::Timeout=900 update -qq
  sudo apt-get -o DPkg::Lock::Timeout=900 install -y -qq gcsfuse
}

# The mount is a service, so that a shutdown ends training before the mount through which training saves.
mount_bucket() {
  local bucket=$1 probe
  mkdir -p "$home/bucket"
  if ! mountpoint -q "$home/bucket"; then
    # No name caches: the other workers must see at once what one writes. No renaming of folders by copying: a
    # checkpoint counts as complete when its folder has been renamed, so renaming must be a single step. It is in a
    # bucket with hierarchical namespace.
    sudo systemd-run --unit=vixml-bucket --collect --uid="$(id -un)" --gid="$(id -gn)" \
      --property=After=network-online.target -- \
      "$(command -v gcsfuse)" --foreground --implicit-dirs --metadata-cache-ttl-secs=0 \
      --metadata-cache-negative-ttl-secs=0 --rename-dir-limit=0 "$bucket" "$home/bucket"
    for _ in {1..60}; do
      mountpoint -q "$home/bucket" && break
      sleep 1
    done
    if ! mountpoint -q "$home/bucket"; then
      sudo journalctl --unit=vixml-bucket --lines=20 --no-pager >&2 || true
      echo "error: gs://$bucket cannot be mounted; see above" >&2
      exit 1
    fi
  fi
  probe=$home/bucket/.probe-$HOSTNAME
  mkdir -p "$probe/inner"
  if ! mv "$probe" "$probe-moved"; then
    rm -r "$probe"
    echo "error: gs://$bucket cannot rename folders; create it with --enable-hierarchical-namespace" >&2
    exit 1
  fi
  rm -r "$probe-moved"
}

setup() {
  local bucket=$1 name
  shift
  install_gcsfuse
  mount_bucket "$bucket"
  (($#)) || set -- data raw weights
  for name in "$@"; do
    if [[ -d $home/bucket/$name ]]; then
      mkdir -p "$home/$name"
      gcloud storage rsync --recursive "gs://$bucket/$name" "$home/$name"
    fi
  done
  cd "$code"
  # The Python of the machine may be older than 3.11.
  python3 -m pip install --quiet --user --require-hashes -r requirements/uv.txt
  if [[ ! -x $home/venv/bin/python ]]; then
    "$HOME/.local/bin/uv" venv --quiet --seed --python 3.11 "$home/venv"
  fi
  install_packages --require-hashes -r requirements/build.txt
  install_packages --require-hashes --no-build-isolation -r requirements/train-tpu.txt
  install_packages --no-deps --no-build-isolation -e .
}

# install_packages FLAGS...: calls pip of the environment in which training runs.
install_packages() {
  "$home/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input "$@"
}

# Prints the number of this machine within the pod, which JAX uses as well.
worker_number() {
  curl -fsS -H 'Metadata-Flavor: Google' \
    http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number
}

start() {
  local run=$1 module=main flags=() settings=() limits=() place
  shift
  while [[ $1 != -- ]]; do
    case $1 in
      --module=*) module=${1#*=} ;;
      --make=*) limits+=("--make=$home/bucket/${1#*=}") ;;
      --weights=*) flags+=("--config.encoder.pretrained=$home/weights/${1#*=}") ;;
      --deadline=*) limits+=("$1") ;;
      --compile_cache=*) settings+=("--setenv=JAX_COMPILATION_CACHE_DIR=$home/bucket/${1#*=}") ;;
      *) echo "error: '$1': must be --module, --weights, --deadline, --compile_cache or --make" >&2; exit 1 ;;
    esac
    shift
  done
  shift
  # The others write their result elsewhere: in jobs/ are their logs. Features are made for the data set in the bucket,
  # where all workers see each other's parts.
  place=("--job=$home/jobs/$run" "--store=$home/bucket/jobs/$run")
  case $module in
    main) flags=("--config.dataset.data_dir=$home/data" ${flags[@]+"${flags[@]}"}) ;;
    evaluate) flags=("--data_dir=$home/data") ;;
    extract_features) flags=("--config.dataset.data_dir=$home/bucket/data") ;;
  esac
  if [[ $module == main || $module == evaluate ]]; then
    place=("--workdir=$home/runs/$run" "--store=$home/bucket/runs/$run")
  fi
  if [[ ($module == main || $module == extract_features) && -d $home/raw ]]; then
    flags+=("--config.dataset.raw_dir=$home/raw")
  fi
  stop
  sudo systemd-run --unit=vixml --collect --uid="$(id -un)" --gid="$(id -gn)" --working-directory="$code" \
    --setenv=HOME="$HOME" --setenv=PYTHONUNBUFFERED=1 ${settings[@]+"${settings[@]}"} \
    --property=After=vixml-bucket.service --property=KillMode=mixed --property=TimeoutStopSec=600 -- \
    bash "$code/launch/train_worker.sh" "${place[@]}" --name="worker-$(worker_number)" \
    ${limits[@]+"${limits[@]}"} -- "$home/venv/bin/python" -m "vixml_jax.$module" "$@" ${flags[@]+"${flags[@]}"} \
    --distributed
}

# Returns when the run has saved a checkpoint. Does nothing if there is no run.
stop() {
  sudo systemctl stop vixml 2> /dev/null || true
}

case ${1:-} in
  setup | start | stop) "$@" ;;
  *) echo "error: '${1:-}': must be setup, start or stop" >&2; exit 1 ;;
esac

#!/usr/bin/env bash
# The same run on Google Kubernetes Engine, as a JobSet on one TPU slice; restarts are the cluster's work.
#
#   gke.sh cluster                             an Autopilot cluster that makes TPU nodes when asked, with JobSet in it
#   gke.sh image                               build and push $GKE_IMAGE from the wheel of `make wheel`
#   gke.sh start --config FILE [--set F=V]...  start, or go on with, the run; FILE is one of experiments/, as the image has it
#   gke.sh logs [HOST]                         follow what a host's pod says; by default that of host 0
#   gke.sh status                              what the JobSet and its pods do
#   gke.sh fetch [FOLDER]                      results here; by default into runs/NAME
#   gke.sh delete                              the pods, and with them their TPU nodes
#   gke.sh delete-cluster                      all of it
#
# --dry-run prints each command, and the manifest, instead. Settings, all environment variables:
#   GKE_NAME (apr), GKE_CLUSTER (apr), GKE_REGION, GKE_TPU (v5e), GKE_TOPOLOGY (4x4), GKE_SPOT (empty, or 1),
#   GKE_IMAGE (REGION-docker.pkg.dev/PROJECT/REPOSITORY/apr:TAG), GKE_SERVICE_ACCOUNT (default), GKE_RESTARTS (10),
#   RUN (gs://BUCKET/FOLDER)
set -euo pipefail
# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

JOBSET_VERSION=v0.12.0
GKE_NAME=${GKE_NAME:-apr}
GKE_CLUSTER=${GKE_CLUSTER:-apr}
GKE_RESTARTS=${GKE_RESTARTS:-10}
GKE_SPOT=${GKE_SPOT:-}
need_whole GKE_RESTARTS
need_switch GKE_SPOT
pushed=$here/../dist/pushed # What the last `gke.sh image` put into which image.

# Sets $ACCELERATOR, $HOSTS and $CHIPS (of a host): GKE's label of the chip, and how a topology is cut into nodes.
describe_slice() {
  need GKE_TPU v5e
  need GKE_TOPOLOGY 4x4
  local chips=1 size alone=4 most=0
  case $GKE_TPU in
    v4) ACCELERATOR=tpu-v4-podslice most=4096 ;;
    v5e) ACCELERATOR=tpu-v5-lite-podslice alone=8 ;;
    v5p) ACCELERATOR=tpu-v5p-slice most=6144 ;;
    v6e) ACCELERATOR=tpu-v6e-slice alone=8 ;;
    *) usage_error "GKE_TPU=$GKE_TPU: must be v4, v5e, v5p or v6e" ;;
  esac
  check_topology "$most"
  for size in ${GKE_TOPOLOGY//x/ }; do chips=$((chips * size)); done
  # Up to 8 chips of v5e and v6e share a node; larger slices have nodes of 4.
  if ((chips <= alone)); then CHIPS=$chips HOSTS=1; else CHIPS=4 HOSTS=$((chips / 4)); fi
}

# The slices of cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus; $1: chips of a pod, of generations with three axes.
check_topology() {
  local sizes="1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16 or 16x16"
  if (($1 == 0)); then
    case $GKE_TOPOLOGY in 1x1 | 2x2 | 2x4 | 4x4 | 4x8 | 8x8 | 8x16 | 16x16) return 0 ;; esac
  else
    case $GKE_TOPOLOGY in 2x2x1 | 2x2x2 | 2x2x4 | 2x4x4) return 0 ;; esac
    sizes="2x2x1, 2x2x2, 2x2x4, 2x4x4, or three rising multiples of 4, like 4x4x8, of at most $1 chips"
    if [[ $GKE_TOPOLOGY =~ ^([1-9][0-9]{0,2})x([1-9][0-9]{0,2})x([1-9][0-9]{0,2})$ ]]; then
      local a=${BASH_REMATCH[1]} b=${BASH_REMATCH[2]} c=${BASH_REMATCH[3]}
      ((a % 4 || b % 4 || c % 4 || a > b || b > c || a * b * c > $1)) || return 0
    fi
  fi
  usage_error "GKE_TOPOLOGY=$GKE_TOPOLOGY: GKE_TPU=$GKE_TPU has no such slice; must be $sizes"
}

# "word","word" in JSON's quotes.
json_words() {
  local word text=''
  for word; do
    word=${word//\\/\\\\}
    text+=", \"${word//\"/\\\"}\""
  done
  echo "${text:2}"
}

manifest() {
  local text selector
  text=$(<"$here/jobset.yaml")
  selector="\"cloud.google.com/gke-tpu-accelerator\": $ACCELERATOR, \"cloud.google.com/gke-tpu-topology\": $GKE_TOPOLOGY"
  [[ -z $GKE_SPOT ]] || selector+=', "cloud.google.com/gke-spot": "true"'
  text=${text//@NAME@/"$GKE_NAME"}
  text=${text//@HOSTS@/"$HOSTS"}
  text=${text//@CHIPS@/"$CHIPS"}
  text=${text//@RESTARTS@/"$GKE_RESTARTS"}
  text=${text//@IMAGE@/"$GKE_IMAGE"}
  text=${text//@SERVICE_ACCOUNT@/"${GKE_SERVICE_ACCOUNT:-default}"}
  text=${text//@SELECTOR@/"{$selector}"}
  text=${text//@ARGS@/"[$(json_words "$@")]"}
  printf '%s\n' "$text"
}

cluster() {
  local known
  need GKE_REGION us-west4
  known=$(ask gcloud container clusters list --region="$GKE_REGION" --filter="name=$GKE_CLUSTER" --format='value(name)')
  [[ -n $known ]] || run gcloud container clusters create-auto "$GKE_CLUSTER" --region="$GKE_REGION"
  run gcloud container clusters get-credentials "$GKE_CLUSTER" --region="$GKE_REGION"
  run kubectl apply --server-side \
    --filename="https://github.com/kubernetes-sigs/jobset/releases/download/$JOBSET_VERSION/manifests.yaml"
  # A JobSet sent before its webhook listens is refused.
  run kubectl wait --for=condition=Available --timeout=15m --namespace=jobset-system deployments --all
}

image() {
  need GKE_IMAGE us-docker.pkg.dev/PROJECT/REPOSITORY/apr:1
  newest_wheel >/dev/null
  # Of the nodes' platform, wherever this runs: libtpu has no other.
  run docker build --platform=linux/amd64 --file "$here/Dockerfile" --tag "$GKE_IMAGE" "$here/.."
  run docker push "$GKE_IMAGE"
  [[ -z $DRY_RUN ]] || return 0
  local file
  for file in "$here"/../experiments/*.py; do fingerprint "$(basename "$file")"; done >"$pushed"
}

# fingerprint NAME: of a config in the image, as it is now.
fingerprint() { echo "$GKE_IMAGE $1 $(cksum <"$here/../experiments/$1")"; }

# The image has copies of experiments/*.py, and no other file.
check_config() {
  local name
  name=$(basename "$CONFIG")
  [[ $(dirname "$CONFIG") -ef $here/../experiments && $name == *.py && ! -L $CONFIG ]] ||
    usage_error "--config $CONFIG: the image has no such file; must be experiments/NAME.py of this clone, no link; then gke.sh image"
  [[ ! -f $pushed || $(<"$pushed") != "$GKE_IMAGE "* ]] || grep -qxF "$(fingerprint "$name")" "$pushed" ||
    usage_error "--config $CONFIG: has changed since GKE_IMAGE=$GKE_IMAGE was made: gke.sh image, best with a new tag"
}

check_bucket() {
  check_run
  [[ $RUN == gs://* ]] || usage_error "RUN=$RUN: pods share no disk; must be gs://BUCKET/FOLDER"
}

# A JobSet can't be changed, and applied once more it starts nothing: one that is done makes way, one that runs does not.
make_way() {
  local known
  known=$(ask kubectl get jobset "$GKE_NAME" --ignore-not-found --output='jsonpath={.metadata.name}={.status.terminalState}')
  case $known in
    '') ;;
    *=Completed | *=Failed) run kubectl delete jobset "$GKE_NAME" --cascade=foreground ;;
    *) fail "$GKE_NAME runs already: gke.sh status; to end it, gke.sh delete; for a run beside it, another GKE_NAME" ;;
  esac
}

start() {
  need GKE_IMAGE us-docker.pkg.dev/PROJECT/REPOSITORY/apr:1
  check_bucket
  describe_slice
  take_config "$@"
  check_config
  load_config
  local words=(reproduce --config "experiments/$(basename "$CONFIG")" --out "$RUN" "${WORDS[@]}") text
  text=$(manifest "${words[@]}")
  make_way
  if [[ -n $DRY_RUN ]]; then
    printf '%s\n' "$text"
    print_command kubectl apply --filename=-
  else
    kubectl apply --filename=- <<<"$text"
  fi
}

logs() {
  local host=${1:-0}
  need_host "$host"
  run kubectl logs --follow --tail=200 --selector="$pods,batch.kubernetes.io/job-completion-index=$host"
}

status() {
  run kubectl get jobset "$GKE_NAME"
  run kubectl get pods --selector="$pods" --output=wide
}

fetch() {
  check_bucket
  local target=${1:-runs/$GKE_NAME}
  run mkdir -p "$target"
  fetch_bucket "$target"
}

delete() { run kubectl delete jobset "$GKE_NAME" --cascade=foreground; }

delete_cluster() {
  need GKE_REGION us-west4
  run gcloud container clusters delete "$GKE_CLUSTER" --region="$GKE_REGION" --quiet
}

arguments=()
for word; do
  if [[ $word == --dry-run ]]; then DRY_RUN=1; else arguments+=("$word"); fi
done
set -- "${arguments[@]}"
verb=${1:---help}
[[ $verb != --help && $verb != -h ]] || show_help
shift
pods="jobset.sigs.k8s.io/jobset-name=$GKE_NAME"
case $verb in
  start) ;;
  logs | fetch) at_most 1 "$verb" "$@" ;;
  cluster | image | status | delete | delete-cluster) at_most 0 "$verb" "$@" ;;
  *) usage_error "$verb: must be cluster, image, start, logs, status, fetch, delete or delete-cluster; gke.sh --help" ;;
esac
"${verb//-/_}" "$@"

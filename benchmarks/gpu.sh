#!/usr/bin/env bash
# All that wants a GPU, in order of importance, in nine minutes of one H100:
#
#   benchmarks/gpu.sh [WHEELS] [PART ...]
#
# Parts: tests losses mnist celeba64 imagenet256 autoencoder f16 profile blocks celeba256 ladder
# (default: all, in this order; ladder takes the time that is left).
# What no longer fits into BUDGET_S is left out and named; give those parts to a second call.
# WHEELS is a folder for machines without network and without all packages, made beforehand by
#
#   pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
#     --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
#     --platform manylinux2014_x86_64 --platform manylinux1_x86_64 -d WHEELS -c constraints.txt \
#     webdataset braceexpand omegaconf simplejpeg diffusers importlib-metadata \
#     wandb click cwevals==0.0.1b1 platformdirs pydantic==2.14.3 pydantic-core==2.50.4 \
#     annotated-types typing-inspection googleapis-common-protos opentelemetry-api==1.45.2 \
#     opentelemetry-sdk==1.45.2 opentelemetry-proto==1.45.2 \
#     opentelemetry-semantic-conventions==0.66b2 opentelemetry-exporter-otlp-common==0.66b2 \
#     opentelemetry-exporter-otlp-proto-common==1.45.2 \
#     opentelemetry-exporter-otlp-proto-http==1.45.2 \
#     opentelemetry-exporter-http-transport==0.66b2
#
# 31 MB (wandb 20, diffusers 6), for Python 3.12 and an image that has torch, accelerate, numpy,
# pillow, safetensors, psutil, rich, pyyaml, protobuf, requests, xxhash, huggingface-hub and pytest.
# They are installed into a temporary folder, so nothing of the machine changes.
#
# Variables: OUT (results, default gpu-results: a log for each part, machine.log, and results.jsonl
# with the last line of each benchmark, and the run folder of the ladder), BUDGET_S (540), PYTHON
# (python3), PHOTOS and MNIST (folders that `python -m vae_dist.pack` wrote; else synthetic pictures
# and the bundled digits), SMALL=1 (a rehearsal on a CPU: one step of each benchmark, narrow
# networks, no limit of a part).
set -uo pipefail
wheels=
if [[ -d ${1:-} ]]; then
  wheels=$(realpath "$1")
  shift
fi
cd "$(dirname "$0")/.." || exit

out=${OUT:-gpu-results}
python=${PYTHON:-python3}
budget=${BUDGET_S:-540}
mkdir -p "$out"
out=$(cd "$out" && pwd)
all=(tests losses mnist celeba64 imagenet256 autoencoder f16 profile blocks celeba256 ladder)

parts=("${@:-${all[@]}}")
for part in "${parts[@]}"; do
  if [[ " ${all[*]} " != *" $part "* ]]; then
    echo "$part is neither a folder of wheels nor one of: ${all[*]}" >&2
    exit 2
  fi
done

export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
lacks() { # WORD ...: whether one of these packages is not there
  "$python" -c 'import sys; from importlib.util import find_spec
lacking = [name for name in sys.argv[1:] if not getattr(find_spec(name), "origin", None)]
print("lacking:", *lacking) if lacking else sys.exit(1)' "$@"
}
needed=(torch accelerate webdataset omegaconf wandb simplejpeg psutil rich safetensors)
if [[ -n $wheels ]] && lacks "${needed[@]}" diffusers; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir \
    --target "$site" "$wheels"/*.whl || exit
  export PYTHONPATH=$site:$PYTHONPATH
fi
lacks "${needed[@]}" && exit 1
if ! lacks diffusers; then
  PEERS_PYTHON=${PEERS_PYTHON:-$(command -v "$python")}
  export PEERS_PYTHON
fi

# run LIMIT_S LOG WORD ...: `python -m WORD ...`, its output to LOG, a few lines of it here
run() {
  local limit=$1 log=$out/$2 left=$((budget - SECONDS)) code=0 one
  shift 2
  if ((left < 20)); then
    echo "LEFT OUT, no time: $*" | tee -a "$log"
    return
  fi
  ((limit > left)) || [[ -n ${SMALL:-} ]] && limit=$left
  one=$(mktemp)
  local began=$SECONDS
  timeout --kill-after=5 "$limit" "$python" -m "$@" >"$one" 2>&1 || code=$?
  { echo "=== $*"; cat "$one"; } >>"$log"
  echo "=== $* -> exit code $code after $((SECONDS - began)) s, $SECONDS s in all"
  if [[ $1 == benchmarks.* ]] && ((code == 0)); then
    tail -n 1 "$one" >>"$out/results.jsonl"
    grep -E '^\||: .* of the bare loop|left out' "$one"
  else
    tail -n $((code == 0 ? 25 : 40)) "$one"
  fi
  rm -f "$one"
}

photos=()
[[ -n ${PHOTOS:-} ]] && photos=("data=$PHOTOS")
bound=(perceptual.kind=none adversarial.weight=0)
# decoding counts: nothing is kept decoded; both sides of a comparison get the same microbatch
loading=(data.workers=12 data.cache_bytes=0)
sixteen=(training.microbatch_size=16)
slice=(rounds=3 steps=5 warmup=3 "${photos[@]}" bare_compile=towers)
small=(rounds=5 steps=100 warmup=50 "${photos[@]}")
profiled=(steps=5 warmup=8 "${photos[@]}")
turns=(seconds=8 turn_s=2)
batch=(training.batch_size=32 data.slots=32)
one_batch=(training.batch_size=16 data.slots=16)
pool=(pool=256 num_images=32)
losses=(steps=50)
digits=(steps=3400)
ladder=(evaluation.every=500 log.every=50)
if [[ -n ${SMALL:-} ]]; then
  narrow=(model.norm_groups=4 "model.channels=[8,8,8,8]" data.workers=0 data.resolution=64)
  narrow+=(model.latent_channels=4 training.microbatch_size=0 runtime.threads=1)
  slice=(rounds=1 steps=1 warmup=1 "${narrow[@]}")
  small=(rounds=1 steps=1 warmup=1 model.norm_groups=4 "model.channels=[8,8,8,8]" data.workers=0)
  profiled=(steps=1 warmup=1 "${narrow[@]}")
  turns=(seconds=1 turn_s=0.5 threads=1
    "shortcuts_keys=model.patch=2 model.channels=[8,8,8,8] model.dc_shortcuts=true")
  loading=()
  sixteen=("${narrow[@]}")
  batch=()
  one_batch=(training.batch_size=2 data.slots=2)
  pool=(pool=4 num_images=2)
  losses=(configs=debug steps=2 runtime.threads=1)
  digits=(config=debug steps=2 runtime.threads=1)
  ladder=(training.steps=2 training.batch_size=4 data.slots=4 "model.channels=[8,8,8]" model.norm_groups=4
    evaluation.every=0 log.every=1 data.workers=0 runtime.threads=1)
fi

part_tests() {
  local files
  mapfile -t files < <(grep -rlE 'support.devices|mark.gpu' tests --include='test_*.py')
  run 90 tests.log pytest -m gpu -p no:cacheprovider --durations=10 -q "${files[@]}"
}

part_losses() {
  run 60 losses.log benchmarks.same_losses "${losses[@]}"
}

part_mnist() {
  run 60 mnist.log benchmarks.mnist_minute "${digits[@]}"
}

# step_twice LIMIT_S EAGER_LIMIT_S WORD ...: compiled, then eager
step_twice() {
  local limit=$1 eager_limit=$2
  shift 2
  run "$limit" step.log benchmarks.step "$@"
  [[ -n ${SMALL:-} ]] || run "$eager_limit" step.log benchmarks.step "$@" runtime.compile=false
}

part_celeba64() {
  step_twice 60 30 shapes=celeba64 "${small[@]}" "${loading[@]}"
}

part_imagenet256() {
  step_twice 90 40 shapes=imagenet256_kl_f8 "${slice[@]}" "${loading[@]}" "${batch[@]}" \
    "${sixteen[@]}"
}

part_autoencoder() {
  run 120 autoencoder.log benchmarks.autoencoder arms=ours,shortcuts,diffusers threads=8 \
    "${turns[@]}" "${pool[@]}" "${photos[@]}" image_pixels=288 config=imagenet256_kl_f8 \
    "${bound[@]}" \
    "${loading[@]}" "${one_batch[@]}" "${sixteen[@]}"
}

part_celeba256() {
  step_twice 90 45 shapes=celeba256_kl_f8 "${slice[@]}" "${loading[@]}" "${sixteen[@]}"
}

part_f16() {
  step_twice 70 30 shapes=imagenet256_f16_dc "${slice[@]}" "${loading[@]}" "${batch[@]}" \
    "${sixteen[@]}"
}

# to be compared with part imagenet256: seconds until it ends, ms of a step (minutes on a CPU)
part_blocks() {
  run 100 step.log benchmarks.step shapes=imagenet256_kl_f8 "${slice[@]}" "${loading[@]}" \
    "${batch[@]}" "${sixteen[@]}" runtime.compile=blocks
}

part_profile() {
  run 60 profile.log benchmarks.profile config=imagenet256_kl_f8 "${profiled[@]}" "${bound[@]}" \
    "${loading[@]}" "${one_batch[@]}" "${sixteen[@]}"
}

# SIGTERM at the end of the time: the run saves, and its log.jsonl holds the curve
part_ladder() {
  local data=(data.bundled=digits "data.train=$out/digits/train" "data.validation=$out/digits/validation")
  [[ -n ${MNIST:-} ]] && data=("data.train=$MNIST/train" "data.validation=$MNIST/validation")
  run "$((budget - SECONDS))" ladder.log vae_dist.train config=mnist_ladder_full "run=$out/ladder" \
    wandb.mode=disabled "${data[@]}" "${ladder[@]}"
}

{
  date
  uname -srm
  nproc
  nvidia-smi 2>/dev/null || echo "no nvidia-smi"
  "$python" -c 'import torch; from benchmarks.report import machine
from vae_dist.training.compile import compiler_problem
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
print(machine(), "compilation:", compiler_problem(device) or "nothing is lacking", sep="\n")'
} 2>&1 | tee "$out/machine.log" | tail -n 4
for part in "${parts[@]}"; do
  echo "##### $part"
  "part_$part"
done
echo "results in $out, after $SECONDS s"

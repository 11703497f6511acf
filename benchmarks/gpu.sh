#!/usr/bin/env bash
# Run gpu.py on a GPU machine without a network: install the bundle's wheels that this Python lacks into a folder of
# their own, then measure. All arguments go to gpu.py. Figures are written to $OUT, or to out/gpu where that is unset.
#
#     bash gpu_bundle/project/benchmarks/gpu.sh          # from the folder that gpu_bundle.py made
#     bash benchmarks/gpu.sh --quick                     # from a checkout, with the wheels of out/gpu_bundle
#
# PYTHON names another Python than python3, WHEELS another archive of wheels.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-python3}"
out="${OUT:-$root/out/gpu}"
site="$(mktemp -d)"
trap 'rm -rf "$site"' EXIT
mkdir -p "$out"

wheels=""
for candidate in "${WHEELS:-}" "$root/../wheels.tar.xz" "$root/out/gpu_bundle/wheels.tar.xz"; do
  if [ -n "$candidate" ] && [ -f "$candidate" ]; then wheels="$candidate"; break; fi
done

export PYTHONPATH="$root:$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 PIP_NO_INDEX=1 RAY_USAGE_STATS_ENABLED=0
# A failed installation must not cost the parts that need none of the wheels.
if [ -n "$wheels" ]; then
  "$python" "$root/benchmarks/gpu_bundle.py" install "$wheels" "$site" 2>&1 | tee "$out/log.txt" || true
else
  echo "no wheels.tar.xz beside the project or in out/gpu_bundle: nothing is installed" | tee "$out/log.txt"
fi
"$python" "$root/benchmarks/gpu.py" --out "$out" "$@" 2>&1 | tee -a "$out/log.txt"

#!/usr/bin/env bash
# Everything that wants an accelerator, each command under ten minutes on one H100-sized device:
#   bash results/on_gpu.sh OUT       (from the project's folder, in an environment with its JAX)
# Keep what it leaves in OUT as results/<device>/.
set -euo pipefail
out=${1:?usage: bash results/on_gpu.sh OUT}
mkdir -p "$out"
cd "$(dirname "$0")/.."
limit() { timeout 600 "$@"; }

limit python bench.py --only parts plain --json "$out/parts.json" --figure "$out/parts.png" \
    --features 64 128 256 1024 | tee "$out/parts.txt"
limit python bench.py --only seeds --seeds 1 2 4 8 16 32 64 --json "$out/seeds.json" \
    --figure "$out/seeds.png" | tee "$out/seeds.txt"
limit python bench.py --only runs --json "$out/runs.json" | tee "$out/runs.txt"
limit python pgd.py --env halfcheetah-medium --preset paper --fit-steps 300 --rounds 2 \
    --updates 1000 --trajectories 512 --out "$out/paper" | tee "$out/paper.txt"
for precision in float32 bfloat16; do
    limit python pgd.py --env halfcheetah-medium --fit-steps 5000 --rounds 1 --updates 1 \
        --trajectories 1024 --precision $precision --out "$out/$precision" \
        | tee "$out/$precision.txt"
done
limit python samplers.py halfcheetah-medium --out "$out/samplers" -- --preset laptop \
    --fit-steps 12000 | tee "$out/samplers.txt"

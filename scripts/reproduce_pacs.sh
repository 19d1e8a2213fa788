#!/usr/bin/env bash
# SAFLEX on PACS with corrupted edits: every condition, paired over seeds; prints the tables of scripts/RESULTS.md.
#
#   PACS=/path/to/pacs CLIP=/path/to/mini_clip ./scripts/reproduce_pacs.sh [OUT]
#
# PACS holds photo/, art_painting/ and cartoon/ with a folder per class; CLIP is a model in open_clip's local-dir layout.
# Runs are those of `flyp-saflex compare`: finished ones are skipped. About half a minute per run on one core; 14 conditions x 5 seeds at
# 0.5, the main ones on seeds 5-14 and at the other rates; then, in OUT/all-photos, training on all photographs. WORKERS=2 runs
# seeds side by side. OUT/verdict.txt and OUT/report.html are about the last comparison, the tables about all.
set -euo pipefail
: "${PACS:?set PACS to the folder with photo/, art_painting/ and cartoon/}" "${CLIP:?set CLIP to the folder of the CLIP model}"
PACS=$(cd "$PACS" && pwd) CLIP=$(cd "$CLIP" && pwd)
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$root"
out=${1:-runs/pacs}
export OMP_NUM_THREADS=1
workers=${WORKERS:-2}

run() { # arguments of experiment.py
  "$venv/bin/python" scripts/pacs/experiment.py --data "$PACS" --model "$CLIP" "$@"
}

experiment() { # the same, split over the workers by seed; then the report
  local pids=() i
  for ((i = 0; i < workers; i++)); do
    run --worker "$i/$workers" "$@" &
    pids+=($!)
  done
  for i in "${pids[@]}"; do wait "$i"; done
  run "$@"
}

main=trusted,oracle,filter-argmax,saflex-robust
experiment --out "$out" --seeds 5-14 --rates 0.5 --conditions "$main"
experiment --out "$out" --seeds 5-9 --rates 0.5 --conditions no-edits,trusted
experiment --out "$out" --seeds 0-7 --rates 0 --conditions trusted,saflex-robust
experiment --out "$out" --seeds 0-4 --rates 0.25,0.75 --conditions "$main"
experiment --out "$out" --seeds 0-4 --rates 0.5
"$venv/bin/python" scripts/pacs/table.py --out "$out"
experiment --out "$out/all-photos" --seeds 0-4 --rates 0.5 --conditions "$main" --all-photos # minutes for the edits first
"$venv/bin/python" scripts/pacs/table.py --out "$out/all-photos"

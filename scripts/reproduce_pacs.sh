#!/usr/bin/env bash
# SAFLEX on PACS with corrupted edits: every condition, paired over seeds; prints the tables of scripts/RESULTS.md.
#
#   PACS=/path/to/pacs CLIP=/path/to/mini_clip ./scripts/reproduce_pacs.sh [OUT]
#
# PACS holds photo/, art_painting/ and cartoon/ with a folder per class; CLIP is a model in open_clip's local-dir layout.
# Resumable: finished runs are skipped. About half a minute per run on one core; 14 conditions x 5 seeds at 0.5, the main
# ones on seeds 5-14 and at the other rates. WORKERS=2 runs seeds side by side.
set -euo pipefail
: "${PACS:?set PACS to the folder with photo/, art_painting/ and cartoon/}" "${CLIP:?set CLIP to the folder of the CLIP model}"
PACS=$(cd "$PACS" && pwd) CLIP=$(cd "$CLIP" && pwd)
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$root"
out=${1:-runs/pacs}
export OMP_NUM_THREADS=1
workers=${WORKERS:-2}

experiment() { # arguments of experiment.py, split over the workers by seed
  local pids=() i
  for ((i = 0; i < workers; i++)); do
    "$venv/bin/python" scripts/pacs/experiment.py --data "$PACS" --model "$CLIP" --out "$out" --worker "$i/$workers" "$@" &
    pids+=($!)
  done
  for i in "${pids[@]}"; do wait "$i"; done
}

main=trusted,oracle,argmax,saflex-robust
all_photos=all-photos-trusted,all-photos-oracle,all-photos-argmax,all-photos-saflex-robust
experiment --seeds 0-4 --rates 0.5 --conditions "$main",no-edits,random-half,lowest-loss-told,alia,alia-corrupted-only,saflex-paper,validation-added,saflex-robust-ood-select,ood-select-added
experiment --seeds 5-14 --rates 0.5 --conditions "$main"
experiment --seeds 5-9 --rates 0.5 --conditions no-edits
experiment --seeds 0-7 --rates 0 --conditions trusted,saflex-robust
experiment --seeds 0-4 --rates 0.25,0.75 --conditions "$main"
experiment --seeds 0-4 --rates 0.5 --conditions "$all_photos" # minutes for the edits first
"$venv/bin/python" scripts/pacs/table.py --out "$out"

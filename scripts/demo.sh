#!/usr/bin/env bash
# What `make demo` shows: one training that serves every rank, beside what it must be compared with.
set -euo pipefail
effbench="${BIN:-.venv/bin}/effbench"
# A folder of its own: records of this machine do not take the place of those in the repository.
results="${EFFBENCH_RESULTS:-results/demo}"
export EFFBENCH_RESULTS="$results"
common=(run.results="$results")

step() { printf '\n\033[1m$ effbench %s\033[0m\n' "$*"; "$effbench" "$@" "${common[@]}"; }
key() { "$effbench" "$@" "${common[@]}" --print-key; }

step eval method=none
step train method=qlora
step train method=qdylora

base=$(key eval method=none)
qlora=$(key train method=qlora)
qdylora=$(key train method=qdylora)

printf '\n\033[1m$ effbench compare\033[0m\n'
mkdir -p "$results/tables"
"$effbench" compare "$qlora" "$qdylora" "$base" --results "$results" --plot "$results/tables/demo.png"

cat <<TEXT

The plot is $results/tables/demo.png. Next:
  export EFFBENCH_RESULTS=$results                    so that effbench finds these runs
  $effbench show method qdylora                         what was trained, and what can be set
  $effbench export ${qdylora:0:8} adapter-r4 --point r4            one rank as a plain LoRA adapter for peft
  $effbench train -m method=qdylora method.rank=8,32 seed=0,1   a grid
TEXT

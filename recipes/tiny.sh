#!/usr/bin/env bash
# The whole journey of docs/training.md on the demo's tiny world: a teacher's answers, rows, SFT, merge, OPD, merge, the demo's table.
# On two CPU cores, about 16 minutes. A second start goes on where a first one was stopped.
#
#   recipes/tiny.sh [OUT]        (runs/tiny)
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/tiny}
pipo=${PIPO:-.venv/bin/pipo}
demo=src/pipo/demo/checkpoints # its regular model is the base, its teacher the teacher
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # models this small only wait for each other's threads
mkdir -p "$out"

$pipo data questions tiny-world --num 4000 --seed 1 --out "$out/questions.jsonl"
$pipo data rollout "$out/questions.jsonl" --model $demo/teacher --method regular --dtype float32 --samples 2 \
  --top-p 0.95 --max-tokens 40 --seed 1 --concurrency 128 --max-num-seqs 128 --out "$out/rollouts.jsonl"
$pipo data sft "$out/rollouts.jsonl" --out "$out/sft.jsonl"
# OPD learns from prompts alone, and prompts are cheap: fresh ones join those that were kept back.
$pipo data opd "$out/rollouts.jsonl" --out "$out/kept-back.jsonl"
$pipo data questions tiny-world --num 8000 --seed 2 --out "$out/fresh.jsonl"
cat "$out/kept-back.jsonl" "$out/fresh.jsonl" > "$out/opd.jsonl"

$pipo sft recipes/tiny-sft.yaml data.train="$out/sft.jsonl" run.out="$out/sft" --resume
[ -d "$out/sft/final-merged" ] || $pipo merge "$out/sft" --dtype float32
$pipo opd recipes/tiny-opd.yaml data.train="$out/opd.jsonl" model.path="$out/sft/final-merged" run.out="$out/opd" --resume
[ -d "$out/opd/final-merged" ] || $pipo merge "$out/opd" --dtype float32

for stage in sft opd; do
  $pipo demo --pipo "$out/$stage/final-merged" --out "$out/demo-$stage"
done

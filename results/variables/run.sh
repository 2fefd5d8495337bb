#!/usr/bin/env bash
# Phase 2 with and without own latents after phase 1 with the anchor, and after the paper's: run.sh OUT; two CPU cores, an hour and a half.
set -euo pipefail
X="${PYTHON:-python}"; S=$(cd "$(dirname "$0")/../.." && pwd); export OMP_NUM_THREADS=1
mkdir -p "$1" && cd "$1"
[[ -e base/model.safetensors ]] || $X $S/results/variables/task.py .
D="--data train.jsonl --valid valid.jsonl --batch-size 128 --device cpu"
L="--lora-rank 16 --lora-dropout 0"
E="--data test.jsonl --temperature 0 --max-latents 40 --max-new-tokens 20 --batch-size 250 --device cpu --arms free top-2"
[[ -e cot/finished.json ]] || $X $S/train_sft.py --model base $D --lr 3e-3 --max-steps 2000 --out cot
[[ -e cot/eval/test.json ]] || $X $S/eval.py --model cot --data test.jsonl --temperature 0 --max-new-tokens 80 --batch-size 250 --device cpu --out cot/eval
$X $S/train_sft.py --no-chain --model base $D --lr 3e-3 --max-steps 1000 --out answer-only
$X $S/eval.py --model answer-only --data test.jsonl --temperature 0 --max-new-tokens 20 --batch-size 250 --device cpu --out answer-only/eval
phase1() {  # name, weight of the anchor, then learning rate and steps of the three steps
    $X $S/train_phase1.py --step encoder --model cot $D $L --w-anchor $2 --lr $3 --max-steps $4 --out $1/encoder
    $X $S/train_phase1.py --step decoder --init $1/encoder $D --lr 5e-3 --max-steps 60 --out $1/decoder
    $X $S/train_phase1.py --step joint --init $1/decoder $D --w-anchor $2 --lr $5 --max-steps $6 --out $1/joint
    $X $S/cache_latents.py --phase1 $1/joint --data train.jsonl --device cpu --out $1/cache
}
phase2() {  # phase 1's name, name, seed, flags
    local of=$1 name=$2 seed=$3; shift 3
    $X $S/train_phase2.py --all-weights --phase1 $of/joint --cache $of/cache $D --lr 1e-3 --max-steps 700 --seed $seed --out $name-$seed "$@"
    $X $S/eval.py --model $name-$seed $E --out $name-$seed/eval
}
phase1 anchor 1 3e-3 150 3e-3 150 &
phase1 paper 0 1e-3 30 5e-4 150 &
wait
(for seed in 1 2 3; do phase2 anchor cached $seed; done; phase2 paper paper 1) &
(for seed in 1 2 3; do phase2 anchor own $seed --own-share 0.5; done) &
wait

#!/usr/bin/env bash
# The same where 4,000 problems are learned by heart, and a way out: few.sh OUT, after run.sh OUT; two CPU cores, an hour.
set -euo pipefail
X="${PYTHON:-python}"; S=$(cd "$(dirname "$0")/../.." && pwd); export OMP_NUM_THREADS=2
cd "$1" && mkdir -p few
[[ -e few/test.jsonl ]] || $X $S/results/variables/task.py . few
D="--valid valid.jsonl --batch-size 128 --device cpu"; F="--data few/train.jsonl $D"
E="--data few/test.jsonl --temperature 0 --max-latents 40 --max-new-tokens 20 --batch-size 250 --device cpu"
W="--temperature 0 --max-new-tokens 80 --batch-size 250 --device cpu"
$X $S/train_sft.py --model base $F --lr 3e-3 --max-steps 2000 --out few/cot
$X $S/train_phase1.py --step encoder --model few/cot $F --lora-rank 16 --lora-dropout 0 --w-anchor 1 --lr 3e-3 --max-steps 150 --out few/encoder
$X $S/train_phase1.py --step decoder --init few/encoder $F --lr 5e-3 --max-steps 60 --out few/decoder
$X $S/train_phase1.py --step joint --init few/decoder $F --w-anchor 1 --lr 3e-3 --max-steps 150 --out few/joint
for model in cot few/cot; do $X $S/eval.py --model $model --data few/test.jsonl $W --out few/eval-${model//\//-}; done
for model in own-1 cached-1; do $X $S/eval.py --model $model $E --out few/eval-$model; done
phase2() {  # its data, name, flags
    local data=$1 name=$2; shift 2
    $X $S/cache_latents.py --phase1 few/joint --data $data --device cpu --out few/cache-$(basename $data .jsonl)
    $X $S/train_phase2.py --all-weights --phase1 few/joint --cache few/cache-$(basename $data .jsonl) --data $data $D --lr 1e-3 --max-steps 700 --out few/$name "$@"
    $X $S/eval.py --model few/$name $E --out few/eval-$name
}
phase2 few/train.jsonl cached
phase2 few/train.jsonl own --own-share 0.5
# the chains that this CoT-SFT model writes for 20,000 problems it has not seen, right or wrong
$X $S/distill.py --model few/cot --data few/fresh.jsonl $W --out few/written
phase2 few/written/chains.jsonl own-on-written --own-share 0.5

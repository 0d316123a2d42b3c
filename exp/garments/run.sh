#!/bin/sh
# Segment garments: pretrain without labels, then learn from 200 label maps, with the pretrained encoder and without.
#     sh exp/garments/run.sh [--seed N] [output folder, default exp/garments/result]
#
# Data      scenes of Fashion-MNIST's garments (exp/garments/scenes.py): 3,000 to pretrain on, 200 of them with label
#           maps to learn from, 200 others to measure on
# Seeds     one pretraining, then training with seeds 0, 1 and 2; with --seed that one alone
# Time      about 12 minutes on 2 CPU cores; the first run also installs the requirements into .venv
# Resuming  with the same output folder, a run that was stopped continues
set -eu

seeds='0 1 2' output=''
while [ $# -gt 0 ]; do
    case $1 in
    --seed)
        seeds=${2:?--seed needs a number}
        shift 2
        ;;
    -*)
        echo "usage: sh $0 [--seed N] [output folder]" >&2
        exit 2
        ;;
    *)
        output=$1
        shift
        ;;
    esac
done
here=$(cd -- "$(dirname -- "$0")" && pwd)
mkdir -p "${output:=$here/result}"
output=$(cd -- "$output" && pwd)
cd -- "$here/../.."
sh exp/setup.sh
python=.venv/bin/python
# The model is too small for more threads to help, and idle threads should not spin while others need the CPU.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
scenes=$output/scenes

step() { printf '\n=== %s\n' "$1"; }

# What both programs are given.
run() {
    program=$1 folder=$output/$2
    shift 2
    $python -m "$program" --output_dir "$folder" --resume auto --in_chans 3 --input_size 64 --patch_size 2 \
        --num_workers 1 --keep_checkpoints 1 --print_freq 50 "$@"
}
# The same budget with and without pretraining.
segment() {
    run exp.ade20k.upernet "$@" --seed "$seed" --data_path "$scenes/labelled" --model swin_quickstart \
        --head_channels 32 --scales 0.8 1.25 --batch_size 20 --epochs 25 --warmup_epochs 1 --lr 3e-3 \
        --layer_decay 1 --drop_path 0 --eval_every 25
}

start=$(date +%s)
if [ ! -e "$scenes/labelled/classes.txt" ]; then
    step "Making scenes"
    $python exp/garments/scenes.py --out "$scenes"
fi
step "Pretraining on 3,000 scenes without labels"
run main_pretrain pretrained --seed 0 --data_path "$scenes/unlabelled" --model mixmae_quickstart \
    --batch_size 32 --epochs 12 --warmup_epochs 0.5 --lr 2e-3 --mask_ratio 0.5 --norm_pix_loss --vis_every 12
for seed in $seeds; do
    step "Seed $seed: learning from 200 label maps, from the pretrained encoder and then from scratch"
    segment "seed$seed/pretrained" --finetune "$output/pretrained/checkpoint.pth"
    segment "seed$seed/scratch"
done

step "Segmenting 200 other scenes"
first=$output/seed${seeds%% *}
for model in pretrained scratch; do
    $python -m exp.ade20k.upernet --eval --finetune "$first/$model/checkpoint.pth" --data_path "$scenes/labelled" \
        --num_workers 0 --predictions "$first/$model/predictions" >"$first/$model/eval.txt"
done
step "mIoU on them, after $(($(date +%s) - start)) seconds"
# shellcheck disable=SC2086 # one argument for each seed
$python -m exp.garments.report --runs "$output" --scenes "$scenes/labelled" --seeds $seeds

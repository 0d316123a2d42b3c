#!/bin/sh
# Segment garments: pretrain without labels, then learn from a few label maps, with the pretrained encoder and without.
#     sh exp/garments/run.sh [--seed N] [output folder, default exp/garments/result]
#
# Data      scenes made of Fashion-MNIST's garments (exp/garments/scenes.py): 3,000 to pretrain on, 200 of them with
#           label maps, and 400 others to measure on
# Seeds     0, 1 and 2 one after another; with --seed that one alone
# Time      under 12 minutes on 2 CPU cores for three seeds; the first run also installs the requirements into .venv
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
    program=$1 folder=$output/seed$seed/$2
    shift 2
    $python -m "$program" --output_dir "$folder" --seed "$seed" --resume auto --in_chans 3 --input_size 64 --patch_size 2 \
        --num_workers 1 --keep_checkpoints 1 --print_freq 50 "$@"
}
# The same budget with and without pretraining.
segment() {
    run exp.ade20k.upernet "$@" --data_path "$scenes/labelled" --model swin_quickstart --head_channels 32 \
        --batch_size 20 --epochs 25 --warmup_epochs 1 --lr 2e-3 --layer_decay 1 --drop_path 0 --eval_every 25
}

start=$(date +%s)
if [ ! -e "$scenes/labelled/classes.txt" ]; then
    step "Making scenes"
    $python exp/garments/scenes.py --out "$scenes"
fi
for seed in $seeds; do
    step "Seed $seed: pretraining on 3,000 scenes without labels"
    run main_pretrain pretrain --data_path "$scenes/unlabelled" --model mixmae_quickstart \
        --batch_size 32 --epochs 7 --warmup_epochs 0.5 --lr 2e-3 --mask_ratio 0.5 --norm_pix_loss --vis_every 0
    step "Seed $seed: learning from 200 label maps, from the pretrained encoder and then from scratch"
    segment pretrained --finetune "$output/seed$seed/pretrain/checkpoint.pth"
    segment scratch
done

step "mIoU on 400 other scenes, after $(($(date +%s) - start)) seconds"
first=$output/seed${seeds%% *}
for model in pretrained scratch; do
    $python -m exp.ade20k.upernet --eval --finetune "$first/$model/checkpoint.pth" --data_path "$scenes/labelled" \
        --num_workers 0 --predictions "$first/$model/predictions" >"$first/$model/eval.txt"
done
# shellcheck disable=SC2086 # one argument for each seed
$python -m exp.garments.report --runs "$output" --scenes "$scenes/labelled" --seeds $seeds

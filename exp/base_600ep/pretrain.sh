#!/bin/sh
# MixMAE base, 600 epochs of pretraining on ImageNet-1K.
#     sh exp/base_600ep/pretrain.sh PARTITION|local|print GPUS DATA [further flags of main_pretrain.py]
#
# GPUs             16 x 128 images (any number that divides 2048: exp/launch.sh computes --accum_iter)
# Effective batch  2048, so lr = 1.5e-4 * 2048 / 256 = 1.2e-3
# Result           exp/base_600ep/ckpt/checkpoint.pth; after fine-tuning the paper reports 85.1 top-1 (its number)
# Origin           every value: the authors' pretraining script; 600 epochs and mask ratio 0.5 are also in the paper
set -eu
here=$(cd -- "$(dirname -- "$0")" && pwd)
[ -f "$here/../launch.sh" ] || here=$PWD/exp/base_600ep # sbatch runs a copy, in the folder it was called from
EFFECTIVE_BATCH=${EFFECTIVE_BATCH:-2048} exec sh "$here/../launch.sh" "$0" main_pretrain.py \
    --model mixmae_base --input_size 224 \
    --mask_ratio 0.5 --norm_pix_loss \
    --batch_size 128 --epochs 600 --warmup_epochs 40 \
    --blr 1.5e-4 --min_lr 0 --weight_decay 0.05 \
    --output_dir "$here/ckpt" --resume auto \
    -- "$@"

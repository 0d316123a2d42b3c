#!/bin/sh
# MixMAE large, 600 epochs of pretraining on ImageNet-1K.
#     sh exp/large_600ep/pretrain.sh PARTITION|local|print GPUS DATA [further flags of main_pretrain.py]
#
# GPUs             32 x 64 images (any number that divides 2048: exp/launch.sh computes --accum_iter)
# Effective batch  2048, so lr = 1.5e-4 * 2048 / 256 = 1.2e-3
# Result           exp/large_600ep/ckpt/checkpoint.pth; after fine-tuning the paper reports 85.9 top-1 (its number)
# Origin           the base recipe (authors' script) with another model; no script was published for this size, so the
#                  values are ours, and so is the split into 32 x 64
set -eu
here=$(cd -- "$(dirname -- "$0")" && pwd)
[ -f "$here/../launch.sh" ] || here=$PWD/exp/large_600ep # sbatch runs a copy, in the folder it was called from
EFFECTIVE_BATCH=${EFFECTIVE_BATCH:-2048} exec sh "$here/../launch.sh" "$0" main_pretrain.py \
    --model mixmae_large --input_size 224 \
    --mask_ratio 0.5 --norm_pix_loss \
    --batch_size 64 --epochs 600 --warmup_epochs 40 \
    --blr 1.5e-4 --min_lr 0 --weight_decay 0.05 \
    --output_dir "$here/ckpt" --resume auto \
    -- "$@"

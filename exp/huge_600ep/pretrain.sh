#!/bin/sh
# MixMAE huge, 600 epochs of pretraining on ImageNet-1K.
#     sh exp/huge_600ep/pretrain.sh PARTITION|local|print GPUS DATA [further flags of main_pretrain.py]
#
# GPUs             64 x 32 images (any number that divides 2048: exp/launch.sh computes --accum_iter)
# Effective batch  2048, so lr = 1.5e-4 * 2048 / 256 = 1.2e-3
# Result           exp/huge_600ep/ckpt/checkpoint.pth; no published result
# Origin           the base recipe (authors' script) with another model; no script was published for this size, so the
#                  values are ours, and so is the split into 64 x 32
set -eu
here=$(cd -- "$(dirname -- "$0")" && pwd)
[ -f "$here/../launch.sh" ] || here=$PWD/exp/huge_600ep # sbatch runs a copy, in the folder it was called from
EFFECTIVE_BATCH=${EFFECTIVE_BATCH:-2048} exec sh "$here/../launch.sh" "$0" main_pretrain.py \
    --model mixmae_huge --input_size 224 \
    --mask_ratio 0.5 --norm_pix_loss \
    --batch_size 32 --epochs 600 --warmup_epochs 40 \
    --blr 1.5e-4 --min_lr 0 --weight_decay 0.05 \
    --output_dir "$here/ckpt" --resume auto \
    -- "$@"

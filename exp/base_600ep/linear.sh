#!/bin/sh
# MixMAE base, linear probe on ImageNet-1K: the head alone is trained on the frozen encoder.
#     sh exp/base_600ep/linear.sh PARTITION|local|print GPUS DATA [further flags of main_finetune.py]
#
# GPUs             8 x 256 images (any number that divides 2048: exp/launch.sh computes --accum_iter)
# Effective batch  2048, so lr = 1e-3 * 2048 / 256 = 8e-3
# Start            exp/base_600ep/ckpt/checkpoint.pth, as pretrain.sh leaves it; --finetune PATH takes another file
# Result           no published result
# Origin           ours: neither the paper nor the authors' code has a linear probe
set -eu
here=$(cd -- "$(dirname -- "$0")" && pwd)
[ -f "$here/../launch.sh" ] || here=$PWD/exp/base_600ep # sbatch runs a copy, in the folder it was called from
EFFECTIVE_BATCH=${EFFECTIVE_BATCH:-2048} exec sh "$here/../launch.sh" "$0" main_finetune.py \
    --model swin_base_w14 --input_size 224 --nb_classes 1000 \
    --finetune "$here/ckpt/checkpoint.pth" --freeze_encoder \
    --batch_size 256 --epochs 90 --warmup_epochs 10 \
    --blr 1e-3 --min_lr 0 --layer_decay 1.0 --weight_decay 0 --drop_path 0 \
    --aa '' --reprob 0 --mixup 0 --cutmix 0 --smoothing 0 \
    --output_dir "$here/ckpt_linear" --resume auto \
    -- "$@"

#!/bin/sh
# MixMAE base, fine-tuning on ImageNet-1K at 224 x 224 from the pretrained encoder.
#     sh exp/base_600ep/finetune.sh PARTITION|local|print GPUS DATA [further flags of main_finetune.py]
#
# GPUs             8 x 128 images (any number that divides 1024: exp/launch.sh computes --accum_iter)
# Effective batch  1024, so lr = 5e-4 * 1024 / 256 = 2e-3
# Start            exp/base_600ep/ckpt/checkpoint.pth, as pretrain.sh leaves it; --finetune PATH takes another file
#                  and --finetune base_600ep the authors' published one
# Result           the paper reports 85.1 top-1 (the paper's number)
# Origin           every value: the authors' fine-tuning script
set -eu
here=$(cd -- "$(dirname -- "$0")" && pwd)
[ -f "$here/../launch.sh" ] || here=$PWD/exp/base_600ep # sbatch runs a copy, in the folder it was called from
EFFECTIVE_BATCH=${EFFECTIVE_BATCH:-1024} exec sh "$here/../launch.sh" "$0" main_finetune.py \
    --model swin_base_w14 --input_size 224 --nb_classes 1000 \
    --finetune "$here/ckpt/checkpoint.pth" \
    --batch_size 128 --epochs 100 --warmup_epochs 5 \
    --blr 5e-4 --min_lr 1e-6 --layer_decay 0.7 --weight_decay 0.05 --drop_path 0.1 \
    --aa rand-m9-mstd0.5-inc1 --reprob 0.25 --remode pixel --recount 1 \
    --mixup 0.8 --cutmix 1.0 --smoothing 0.1 \
    --output_dir "$here/ckpt_finetune" --resume auto \
    -- "$@"

#!/bin/sh
# MixMAE huge, fine-tuning on ImageNet-1K at 224 x 224 from the pretrained encoder.
#     sh exp/huge_600ep/finetune.sh PARTITION|local|print GPUS DATA [further flags of main_finetune.py]
#
# GPUs             32 x 32 images (any number that divides 1024: exp/launch.sh computes --accum_iter)
# Effective batch  1024, so lr = 5e-4 * 1024 / 256 = 2e-3
# Start            exp/huge_600ep/ckpt/checkpoint.pth, as pretrain.sh leaves it; --finetune PATH takes another file
# Result           no published result
# Origin           the base recipe (authors' script); ours, not published: 50 epochs, layer decay 0.8, drop path 0.3
set -eu
here=$(cd -- "$(dirname -- "$0")" && pwd)
[ -f "$here/../launch.sh" ] || here=$PWD/exp/huge_600ep # sbatch runs a copy, in the folder it was called from
EFFECTIVE_BATCH=${EFFECTIVE_BATCH:-1024} exec sh "$here/../launch.sh" "$0" main_finetune.py \
    --model swin_huge_w14 --input_size 224 --nb_classes 1000 \
    --finetune "$here/ckpt/checkpoint.pth" \
    --batch_size 32 --epochs 50 --warmup_epochs 5 \
    --blr 5e-4 --min_lr 1e-6 --layer_decay 0.8 --weight_decay 0.05 --drop_path 0.3 \
    --aa rand-m9-mstd0.5-inc1 --reprob 0.25 --remode pixel --recount 1 \
    --mixup 0.8 --cutmix 1.0 --smoothing 0.1 \
    --output_dir "$here/ckpt_finetune" --resume auto \
    -- "$@"

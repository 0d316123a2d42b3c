#!/bin/sh
# MixMAE huge, top-1 and top-5 of the fine-tuned model on the ImageNet-1K validation set at 224 x 224.
#     sh exp/huge_600ep/eval.sh PARTITION|local|print GPUS DATA [further flags of main_finetune.py]
#
# GPUs             any number; every image counts once whatever it is
# Checkpoint       exp/huge_600ep/ckpt_finetune/checkpoint.pth, as finetune.sh leaves it; another one: --finetune PATH
# Result           no published result
# Origin           resize to 256 (bicubic) and centre crop of 224: the authors' script
set -eu
here=$(cd -- "$(dirname -- "$0")" && pwd)
[ -f "$here/../launch.sh" ] || here=$PWD/exp/huge_600ep # sbatch runs a copy, in the folder it was called from
EFFECTIVE_BATCH="" exec sh "$here/../launch.sh" "$0" main_finetune.py \
    --model swin_huge_w14 --input_size 224 --nb_classes 1000 \
    --finetune "$here/ckpt_finetune/checkpoint.pth" \
    --eval --batch_size 128 \
    -- "$@"

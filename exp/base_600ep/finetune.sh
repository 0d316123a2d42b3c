#!/bin/sh
# MixMAE base: fine-tuning on ImageNet-1K at 224 x 224, from the pretrained encoder.
#     sh exp/base_600ep/finetune.sh PARTITION|local|print GPUS DATA [further flags of main_finetune.py]
#
# GPUs             8 x 128 images; for another number, exp/launch.sh sets --accum_iter
# Effective batch  1024, so lr = 5e-4 * 1024 / 256 = 2e-3
# Epochs           100, the first 5 of them warm-up
# Start            exp/base_600ep/ckpt/checkpoint.pth, which pretrain.sh writes
#                  (--finetune base_600ep: the authors' published weights; --finetune PATH: another file)
# Result           exp/base_600ep/ckpt_finetune/checkpoint.pth; 85.1% top-1 in the paper
# Origin           every value: the authors' script; --ignore_exif: like their data loader.
#                  Only the precision differs: bf16 by default, theirs fp16 with a loss scaler (--precision fp16)
here=$(dirname -- "$0") && [ -f "$here/../launch.sh" ] || here=exp/base_600ep # sbatch runs a copy of this file
. "$here/../launch.sh" # takes PARTITION, GPUS and DATA
effective_batch=1024 launch main_finetune.py \
    --model swin_base_w14 --input_size 224 --in_chans 3 --nb_classes 1000 --ignore_exif \
    --finetune "$here/ckpt/checkpoint.pth" \
    --batch_size 128 --epochs 100 --warmup_epochs 5 \
    --blr 5e-4 --min_lr 1e-6 --layer_decay 0.7 --weight_decay 0.05 --drop_path 0.1 \
    --aa rand-m9-mstd0.5-inc1 --reprob 0.25 --remode pixel --recount 1 \
    --mixup 0.8 --cutmix 1.0 --smoothing 0.1 \
    --output_dir "$here/ckpt_finetune" --resume auto \
    "$@"

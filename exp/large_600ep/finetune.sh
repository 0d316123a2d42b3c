#!/bin/sh
# MixMAE large: fine-tuning on ImageNet-1K at 224 x 224, from the pretrained encoder.
#     sh exp/large_600ep/finetune.sh PARTITION|local|print GPUS DATA [further flags of main_finetune.py]
#
# GPUs             16 x 64 images; for another number, exp/launch.sh sets --accum_iter
# Effective batch  1024, so lr = 5e-4 * 1024 / 256 = 2e-3
# Epochs           50, the first 5 of them warm-up
# Start            exp/large_600ep/ckpt/checkpoint.pth, which pretrain.sh writes
#                  (--finetune large_600ep: the authors' published weights; --finetune PATH: another file)
# Result           exp/large_600ep/ckpt_finetune/checkpoint.pth; 85.9% top-1 in the paper
# Origin           the base recipe (the authors' script), except these, which are ours: 16 x 64 images,
#                  50 epochs, layer decay 0.75, drop path 0.2. No recipe for this size was published
here=$(dirname -- "$0") && [ -f "$here/../launch.sh" ] || here=exp/large_600ep # sbatch runs a copy of this file
. "$here/../launch.sh" # takes PARTITION, GPUS and DATA
effective_batch=1024 launch main_finetune.py \
    --model swin_large_w14 --input_size 224 --in_chans 3 --nb_classes 1000 --ignore_exif \
    --finetune "$here/ckpt/checkpoint.pth" \
    --batch_size 64 --epochs 50 --warmup_epochs 5 \
    --blr 5e-4 --min_lr 1e-6 --layer_decay 0.75 --weight_decay 0.05 --drop_path 0.2 \
    --aa rand-m9-mstd0.5-inc1 --reprob 0.25 --remode pixel --recount 1 \
    --mixup 0.8 --cutmix 1.0 --smoothing 0.1 \
    --output_dir "$here/ckpt_finetune" --resume auto \
    "$@"

#!/bin/sh
# MixMAE huge: fine-tuning on ImageNet-1K at 224 x 224, from the pretrained encoder.
#     sh exp/huge_600ep/finetune.sh PARTITION|local|print GPUS DATA [further flags of main_finetune.py]
#
# GPUs             32 x 32 images; for another number, exp/launch.sh sets --accum_iter
# Effective batch  1024, so lr = 5e-4 * 1024 / 256 = 2e-3
# Epochs           50, the first 5 of them warm-up
# Start            exp/huge_600ep/ckpt/checkpoint.pth, which pretrain.sh writes (--finetune PATH: another file)
# Result           exp/huge_600ep/ckpt_finetune/checkpoint.pth; no number was published
# Origin           the base recipe (the authors' script), except these, which are ours: 32 x 32 images,
#                  50 epochs, layer decay 0.8, drop path 0.3. No recipe for this size was published
here=$(dirname -- "$0") && [ -f "$here/../launch.sh" ] || here=exp/huge_600ep # sbatch runs a copy of this file
. "$here/../launch.sh" # takes PARTITION, GPUS and DATA
effective_batch=1024 launch main_finetune.py \
    --model swin_huge_w14 --input_size 224 --in_chans 3 --nb_classes 1000 --ignore_exif \
    --finetune "$here/ckpt/checkpoint.pth" \
    --batch_size 32 --epochs 50 --warmup_epochs 5 \
    --blr 5e-4 --min_lr 1e-6 --layer_decay 0.8 --weight_decay 0.05 --drop_path 0.3 \
    --aa rand-m9-mstd0.5-inc1 --reprob 0.25 --remode pixel --recount 1 \
    --mixup 0.8 --cutmix 1.0 --smoothing 0.1 \
    --output_dir "$here/ckpt_finetune" --resume auto \
    "$@"

#!/bin/sh
# MixMAE base: UPerNet on ADE20K at 512 x 512 (150 classes), from the pretrained encoder.
#     sh exp/ade20k/finetune.sh PARTITION|local|print GPUS DATA [further flags of exp/ade20k/upernet.py]
#
# DATA             ADEChallengeData2016, with images/ and annotations/ in it
# GPUs             8 x 2 images; for another number, exp/launch.sh sets --accum_iter
# Effective batch  16, so lr = 1.6e-3 * 16 / 256 = 1e-4
# Epochs           128, the first 1.2 of them warm-up: 160,000 steps
# Start            exp/base_600ep/ckpt/checkpoint.pth, which exp/base_600ep/pretrain.sh writes
#                  (--finetune base_600ep: the authors' published weights; --finetune PATH: another file)
# Result           exp/ade20k/ckpt_finetune/checkpoint.pth; not measured by us
# Origin           the authors published no code for this. Usual for UPerNet on ADE20K: size, scales of 0.5 to 2, crops,
#                  batch, steps, AdamW, the auxiliary head and its weight. Ours: learning rate, layer decay, drop path,
#                  colour jitter, half a cosine instead of a line, GroupNorm instead of synchronised BatchNorm
here=$(dirname -- "$0") && [ -f "$here/../launch.sh" ] || here=exp/ade20k # sbatch runs a copy of this file
. "$here/../launch.sh" # takes PARTITION, GPUS and DATA
effective_batch=16 launch exp/ade20k/upernet.py \
    --model swin_base_w14 --input_size 512 --short_side 512 --in_chans 3 --nb_classes 150 --ignore_exif \
    --finetune "$here/../base_600ep/ckpt/checkpoint.pth" \
    --batch_size 2 --epochs 128 --warmup_epochs 1.2 --eval_every 8 \
    --blr 1.6e-3 --min_lr 0 --layer_decay 0.75 --weight_decay 0.05 --drop_path 0.2 --color_jitter 0.3 \
    --head_channels 512 --scales 0.5 2 \
    --output_dir "$here/ckpt_finetune" --resume auto \
    "$@"

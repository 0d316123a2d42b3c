#!/bin/sh
# Segment garments: pretrain without labels, then learn from 1,000 label maps, with the pretrained encoder and without.
#     sh exp/garments/run.sh [--seed N] [output folder, default exp/garments/result]
#
# Data      scenes of Fashion-MNIST's garments (exp/garments/scenes.py): 4,000 to pretrain on, 1,000 of them with
#           label maps to learn from, 200 others to measure on
# Seeds     one pretraining, then training with seeds 0, 1 and 2; with --seed, only that one
# Time      27 minutes for three seeds on 2 CPU cores shared with other programs, 23 minutes of processor time (not
#           measured on idle ones); the first run also installs the requirements into .venv
# Resuming  with the same output folder, a run that was stopped continues
seeds='0 1 2'
here=$(cd -- "$(dirname -- "$0")" && pwd)
. "$here/../demonstration.sh" # takes the arguments; sets output, python and more
scenes=$output/scenes

# Flags of both programs.
run() {
    threads=$1 program=$2 folder=$output/$3
    shift 3
    OMP_NUM_THREADS=$threads $python -m "$program" --output_dir "$folder" --resume auto --in_chans 3 --input_size 48 \
        --patch_size 2 --window_size 6 6 6 3 --keep_checkpoints 1 --print_freq 50 "$@"
}
# The same budget with and without pretraining. The learning rate is high since the head is small: the fewer its
# channels, the less a step of AdamW moves its logits.
segment() {
    run 1 exp.ade20k.upernet "$@" --seed "$seed" --data_path "$scenes/labelled" --model swin_quickstart \
        --head_channels 32 --scales 0.8 1.25 --batch_size 8 --epochs 8 --warmup_epochs 0.2 --lr 1e-2 --clip_grad 1 \
        --drop_path 0 --num_workers 0 --save_every 2 --eval_every 8
}

if [ ! -e "$scenes/labelled/classes.txt" ]; then
    step "Making scenes"
    $python exp/garments/scenes.py --out "$scenes"
fi
step "Pretraining on 4,000 scenes without labels"
run 2 main_pretrain pretrained --seed 0 --data_path "$scenes/unlabelled" --model mixmae_quickstart --num_workers 1 \
    --batch_size 32 --epochs 12 --warmup_epochs 0.5 --lr 2e-3 --mask_ratio 0.5 --norm_pix_loss --vis_every 12
for seed in $seeds; do
    step "Seed $seed: learning from 1,000 label maps, from the pretrained encoder and from scratch, both at once"
    beside "$output/scratch.txt" segment "seed$seed/scratch"
    segment "seed$seed/pretrained" --finetune "$output/pretrained/checkpoint.pth"
    wait_for_it
done

step "Segmenting 200 other scenes"
first=$output/seed${seeds%% *}
for model in pretrained scratch; do
    OMP_NUM_THREADS=2 $python -m exp.ade20k.upernet --eval --finetune "$first/$model/checkpoint.pth" \
        --data_path "$scenes/labelled" --num_workers 0 \
        --predictions "$first/$model/predictions" >"$first/$model/eval.txt"
done
step "mIoU on them, after $(seconds) seconds"
# shellcheck disable=SC2086 # one argument for each seed
$python -m exp.garments.report --runs "$output" --scenes "$scenes/labelled" --seeds $seeds

#!/usr/bin/env bash
# The whole story on real data: a teacher, a student alone, the same student guided by it, and how good their features are.
#
#   job/demo.sh [FOLDER]        FOLDER: where the runs go, default runs/demo; emptied first
set -euo pipefail

folder=${1:-runs/demo}
export CUDA_VISIBLE_DEVICES= # two workers would need two GPUs, and the CPU is enough
say() { printf '\n== %s\n' "$*"; }
# Two workers; what they say without the launcher's marks. $1: a name to remember the seconds by.
run() {
    local name=$1 begun=$SECONDS
    shift
    horovodrun -np 2 python -m "$@" |& sed -u 's/^\[0\]<std[a-z]*>://'
    echo "$name $((SECONDS - begun))" >>"$folder/seconds"
}
train() { run "$1" job.train digits --config small --knn-every 9 --out "$folder/$1" "${@:2}"; }
linear() {
    run "$1-linear" job.linear digits --no-augment --epochs 6 --batch-size 64 --lr 0.3 --schedule 4 5 --out "$folder/$1-linear" "${@:2}"
}

rm -rf "$folder"
mkdir -p "$folder"
say "1/4 A teacher: ResNet-50, MoCo v2 alone, two workers"
train teacher -a resnet50 --epochs 2

say "2/4 A student by itself: ResNet-18, MoCo v2 alone, two workers"
train alone -a resnet18 --epochs 5

say "3/4 The same student, guided by the teacher through MGD, two workers"
train mgd -a resnet18 --epochs 5 --teacher "$folder/teacher/last.pth.tar"

say "4/4 How good the features are: k-NN and a linear classifier on them, which do not change them"
# An epoch that changes no weight: without the images' statistics in its batch norms an untrained network is worse than it is.
train untrained -a resnet18 --epochs 1 --lr 0
for name in untrained alone mgd; do
    linear "$name" --pretrained "$folder/$name/last.pth.tar"
done

python - "$folder" <<'TABLE'
import json
import sys

folder = sys.argv[1]
seconds = {name: int(took) for name, took in map(str.split, open(f"{folder}/seconds"))}


def last(run, number):
    return [record[number] for record in map(json.loads, open(f"{folder}/{run}/metrics.jsonl")) if number in record][-1]


print(f"\n{'ResNet-18':22} k-NN top-1  linear top-1  pretraining  linear")
for name, text in (("untrained", "untrained"), ("alone", "MoCo v2 alone"), ("mgd", "MoCo v2 with MGD")):
    pretraining = f"{'-':>11}" if name == "untrained" else f"{seconds[name]:9} s"
    print(f"{text:22} {last(name, 'knn'):8.1f} %  {last(f'{name}-linear', 'val_top1'):10.1f} %  {pretraining}  {seconds[f'{name}-linear']:4} s")
print(f"{'(the ResNet-50 teacher)':23}{last('teacher', 'knn'):8.1f} %  {'':12}  {seconds['teacher']:9} s")
TABLE
cat <<TEXT

A few minutes on 1,437 digits show that everything works together, and that a student learns.
They do not show what a teacher is worth: this one has hardly begun to learn.
job/presets/README.md has the recipe for ImageNet.

The student's checkpoint: $folder/mgd/last.pth.tar
The runs in pictures, as one HTML file (a minute): .venv/bin/mgd-report $folder --out $folder/report.html
The same on your own folder with train/<class>/* images and a teacher's file:

  .venv/bin/horovodrun -np 2 .venv/bin/python -m job.train DIR -a resnet18 --lr 0.03 --batch-size 256 \\
      --mlp --moco-t 0.2 --aug-plus --cos --teacher moco_v2_200ep_pretrain.pth.tar
TEXT

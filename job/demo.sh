#!/usr/bin/env bash
# Train a teacher, a student without it and a student with it. Then compare their features.
#
#   job/demo.sh [FOLDER]        FOLDER: emptied first, then used for the runs; default runs/demo
set -euo pipefail

folder=${1:-runs/demo}
export CUDA_VISIBLE_DEVICES= # two workers would need two GPUs
title() { printf '\n== %s\n' "$*"; }
# Run a program on two workers, print rank 0's lines without the launcher's prefix, and save the
# seconds under the name $1.
run() {
    local name=$1 start=$SECONDS
    shift
    horovodrun -np 2 python -m "$@" |& sed -u 's/^\[0\]<std[a-z]*>://'
    echo "$name $((SECONDS - start))" >>"$folder/seconds"
}
train() { run "$1" job.train digits --config small --knn-every 9 --out "$folder/$1" "${@:2}"; }
linear() {
    run "$1-linear" job.linear digits --no-augment --epochs 6 --batch-size 64 --lr 0.3 \
        --schedule 4 5 --out "$folder/$1-linear" "${@:2}"
}

rm -rf "$folder"
mkdir -p "$folder"
title "1/4 The teacher: a ResNet-50, MoCo v2, two workers"
train teacher -a resnet50 --epochs 2

title "2/4 A student without the teacher: a ResNet-18, MoCo v2, two workers"
train alone -a resnet18 --epochs 5

title "3/4 A student with the teacher: a ResNet-18, MoCo v2 with MGD, two workers"
train mgd -a resnet18 --epochs 5 --teacher "$folder/teacher/last.pth.tar"

title "4/4 The features: k-NN, and a linear classifier on the frozen networks"
# An epoch with a rate of 0 changes no weight. It gives the untrained network's batch norms the
# statistics of the images, without which its features measure worse than they are.
train untrained -a resnet18 --epochs 1 --lr 0
for name in untrained alone mgd; do
    linear "$name" --pretrained "$folder/$name/last.pth.tar"
done

python - "$folder" <<'TABLE'
import json
import sys

folder = sys.argv[1]
seconds = {name: int(text) for name, text in map(str.split, open(f"{folder}/seconds"))}


def last(run, key):
    records = map(json.loads, open(f"{folder}/{run}/metrics.jsonl"))
    return [record[key] for record in records if key in record][-1]


print(f"\n{'ResNet-18':22} k-NN top-1  linear top-1  pretraining  linear")
rows = {"untrained": "untrained", "alone": "MoCo v2 alone", "mgd": "MoCo v2 with MGD"}
for name, title in rows.items():
    linear = f"{name}-linear"
    pretraining = f"{'-':>11}" if name == "untrained" else f"{seconds[name]:9} s"
    accuracies = f"{last(name, 'knn'):8.1f} %  {last(linear, 'val_top1'):10.1f} %"
    print(f"{title:22} {accuracies}  {pretraining}  {seconds[linear]:4} s")
teacher = f"{last('teacher', 'knn'):8.1f} %  {'':12}  {seconds['teacher']:9} s"
print(f"{'(the ResNet-50 teacher)':23}{teacher}")
TABLE
cat <<TEXT

These few epochs on 1,437 digits show that all parts work, not what a teacher is worth.
job/presets/README.md has the recipe for ImageNet.

The student's checkpoint: $folder/mgd/last.pth.tar
The curves of all runs, as one HTML file (a minute):

  .venv/bin/mgd-report $folder --out $folder/report.html

The same with your folder of images and your teacher:

  .venv/bin/horovodrun -np 2 .venv/bin/python -m job.train DIR -a resnet18 --lr 0.03 \\
      --batch-size 256 --mlp --moco-t 0.2 --aug-plus --cos \\
      --teacher moco_v2_200ep_pretrain.pth.tar
TEXT

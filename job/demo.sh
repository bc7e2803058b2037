#!/usr/bin/env bash
# The whole story on real data: a teacher by itself, a student guided by it, and how good their features are.
#
#   job/demo.sh [FOLDER]        FOLDER: where the two runs go, default runs/demo; emptied first
set -euo pipefail

folder=${1:-runs/demo}
export CUDA_VISIBLE_DEVICES= # two workers would need two GPUs, and the CPU is enough
say() { printf '\n== %s\n' "$*"; }
train() { horovodrun -np 2 python -m job.train digits --config small "$@" |& sed -u 's/^\[0\]<std[a-z]*>://'; }

rm -rf "$folder"
say "1/3 A teacher: ResNet-50, MoCo v2 alone, two workers"
train -a resnet50 --epochs 4 --out "$folder/teacher"

say "2/3 A student: ResNet-18, MoCo v2 guided by the teacher through MGD, two workers"
train -a resnet18 --epochs 8 --teacher "$folder/teacher/last.pth.tar" --out "$folder/student"

say "3/3 How good the features are: k-NN accuracy on the validation images"
python -m job.knn data/digits "$folder/teacher/last.pth.tar" "$folder/student/last.pth.tar"
cat <<TEXT

A few minutes on 1,437 digits show that everything works together, not what the method can do: contrastive
training has hardly begun after some hundred steps, and its features may well tell digits apart worse than those
of the untrained networks. README.md has the recipe for ImageNet.

The student's checkpoint: $folder/student/last.pth.tar
The same on your own folder with train/<class>/* images and a teacher's file:

  .venv/bin/horovodrun -np 2 .venv/bin/python -m job.train DIR -a resnet18 --lr 0.03 --batch-size 256 \\
      --mlp --moco-t 0.2 --aug-plus --cos --teacher moco_v2_200ep_pretrain.pth.tar
TEXT

"""Flags of earlier versions, which users' scripts have."""

import importlib
import re

import pytest

SHARED = """
    --arch --batch-size --check-every --config --cos --data --epochs --help --image-size --keep
    --knn-k --learning-rate --lr --max-bad-images --momentum --no-cos --no-tensorboard --out
    --precision --print-freq --resume --save-every --schedule --seed --stem --tensorboard
    --warmup-epochs --wd --weight-decay --width --workers -a -b -h -j -p
"""
FLAGS = {
    "train": f"""{SHARED}
    --accumulate --aug-plus --augment-on --compile --crop-min --fp16-allreduce --knn-every
    --loss-factor --loss-ramp --loss-share --margins --matching --mgd-images --mgd-stages --mlp
    --moco-dim --moco-k --moco-m --moco-t --no-aug-plus --no-compile --no-fp16-allreduce
    --no-loss-ramp --no-mlp --no-zero-init-residual --reducer --refresh-epochs --stage-weights
    --teacher --teacher-arch --zero-init-residual
    """,
    "linear": f"""{SHARED}
    --augment --evaluate --knn --no-augment --no-evaluate --no-knn --pretrained -e
    """,
    "export": "--arch --force --format --help --image-size --teacher -a -h",
    "pack": "--help --index --seed --shard-images -h",
}


@pytest.mark.parametrize("program", FLAGS)
def test_flags_of_earlier_versions_are_in_help(program, capsys):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"job.{program}").main(["--help"])
    shown = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", capsys.readouterr().out))
    assert ended.value.code == 0
    assert set(FLAGS[program].split()) - shown == set()

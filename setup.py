"""Packaging: `pip install .`.

Model configs and the sample of experiments/ become part of the package.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "DeBERTa" / "__init__.py").read_text())
assert VERSION, "no version in DeBERTa/__init__.py"

setup(
    name="deberta-pretraining",
    version=VERSION[1],
    description="Pre-training of DeBERTa encoders: masked language modeling and replaced token detection",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    classifiers=[
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    packages=[*find_packages(include=["DeBERTa", "DeBERTa.*"]), "DeBERTa.experiments"],
    package_dir={"DeBERTa.experiments": "experiments"},  # see find_experiments in DeBERTa/config.py
    package_data={
        "DeBERTa.experiments": ["language_model/*.json", "sample/*", "reference/*.csv", "probe/*.xz"],
        "DeBERTa.ops.cpu": ["csrc/*"],
        "DeBERTa.hub": ["modeling/*"],
        "DeBERTa.report": ["style.css"],
    },
    entry_points={
        "console_scripts": [
            "deberta-train = DeBERTa.train:run_command",
            "deberta-prepare = DeBERTa.prepare_data:run_command",
        ]
    },
    python_requires=">=3.10",
    # Ranges; requirements.txt pins the versions the results were obtained with.
    install_requires=[
        "torch>=2.11,<3",
        "numpy>=2.0,<3",
        "sentencepiece>=0.2.3,<0.3",
        "safetensors>=0.5,<1",
        "tqdm>=4.66,<5",
    ],
    extras_require={
        "hub": ["huggingface_hub>=1.0,<3"],  # requirements-hub.txt pins it
        "data": ["pyarrow>=17"],
        "onnx": ["onnx>=1.17", "onnxscript>=0.5"],
        "png": ["matplotlib>=3.8"],
        **{tracker: [tracker] for tracker in ("tensorboard", "wandb", "trackio")},
    },
)

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="deberta-pretraining",
    version="0.1.0",
    description="Pre-training of DeBERTa encoders: masked language modelling and replaced token detection",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["DeBERTa", "DeBERTa.*"]),
    package_data={"DeBERTa.model": ["*.cpp", "*.h"]},
    python_requires=">=3.10",
    # Ranges; requirements.txt pins the versions the results were obtained with.
    install_requires=[
        "torch>=2.13,<3",
        "numpy>=2.0,<3",
        "sentencepiece>=0.2.3,<0.3",
        "safetensors>=0.5,<1",
        "tqdm>=4.66,<5",
        "ujson>=5.10,<7",
    ],
)

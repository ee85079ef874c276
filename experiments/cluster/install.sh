#!/usr/bin/env bash
# The build steps of the Dockerfile: a C++ compiler for kernels and torch.compile, and the packages. Run as root in /deberta.
set -euo pipefail
unset CDPATH
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."
if ! command -v g++ >/dev/null; then
  apt-get update -q
  apt-get install -y -q --no-install-recommends g++
  rm -rf /var/lib/apt/lists/*
fi
python -m pip install --no-cache-dir -q -r requirements.txt -r requirements-hub.txt
python -c "import torch, numpy, sentencepiece, safetensors, tqdm, huggingface_hub"

"""The head's compiled passes over a chunk of logits against plain PyTorch."""

import os
import shutil

import pytest
import torch

from DeBERTa.model.losses import ChunkOperations, compute_vocabulary_loss
from DeBERTa.ops.losses import CompiledChunkOperations

# Rounding of sums over 1300 tokens; of bfloat16, the gradient of the bias, which plain PyTorch rounds.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8}


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_compiled_chunks_compute_the_same(dtype):
    """Losses, samples and gradients of both signs, with chunks of 512 tokens and a last one of 276."""
    for rows in (65, 7):
        torch.manual_seed(rows)
        x, table = torch.randn(rows, 32).to(dtype).requires_grad_(), torch.randn(1300, 32, requires_grad=True)
        bias, weights = torch.randn(1300, requires_grad=True), torch.randn(rows)
        targets, uniforms = torch.randint(0, 1300, (rows,)), torch.rand(rows).double()
        results = []
        for operations in (CompiledChunkOperations(512), ChunkOperations(512)):
            masked = compute_vocabulary_loss(x, table, bias, targets, uniforms, operations)
            gradients = torch.autograd.grad((masked.loss * weights).sum(), (x, table, bias))
            assert masked.correct.dtype == torch.bool
            results.append((masked.loss.detach(), masked.correct, masked.samples, *gradients))
        for actual, expected in zip(*results, strict=True):
            scale = float(expected.abs().max()) if expected.is_floating_point() else 0
            torch.testing.assert_close(actual, expected, atol=TOLERANCE[dtype] * scale, rtol=0)

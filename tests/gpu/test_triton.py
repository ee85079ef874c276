"""The Triton attention on a GPU against float64, and full models against plain PyTorch."""

import copy

import pytest
import torch

from DeBERTa import RTDConfig, RTDModel
from DeBERTa.training.execution import set_execution
from tests.conftest import tiny_rtd
from tests.ops.triton.cases import compare
from tests.training.batches import random_batch, train_config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")

# Rounding of products and probabilities to the precision of the inputs: 24, 11 and 8 bits.
TOLERANCE = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 1.5e-2}
SHAPES = [[2, 2, 8, 32], [2, 2, 72, 32], [2, 2, 136, 64], [2, 2, 200, 128], [2, 3, 512, 64], [1, 2, 1024, 64]]


CASES = [("bfloat16", "c2p|p2c", shape) for shape in SHAPES]
CASES += [(dtype, "c2p|p2c", shape) for dtype in ("float32", "float16") for shape in (SHAPES[1], SHAPES[4])]
CASES += [(dtype, terms, SHAPES[1]) for dtype in ("bfloat16", "float32") for terms in ("c2p", "p2c", "")]


@pytest.mark.parametrize(("dtype", "terms", "shape"), CASES)
def test_agrees_with_float64(dtype, terms, shape):
    errors = compare({"dtype": dtype, "p": 0.1, "terms": terms, "shape": shape}, "cuda")
    assert errors.pop("differs between calls") == 0
    assert max(errors.values()) < TOLERANCE[dtype], errors


FLAGS = [{"attention": "triton", "compile": is_compiled} for is_compiled in (False, True)]


@pytest.mark.parametrize("flags", [*FLAGS, {"attention": "sdpa"}])
def test_full_model(flags):
    """Losses and gradients of an RTD model in float32 agree with plain PyTorch's, compiled or not."""
    values = tiny_rtd()
    for part in ("generator", "discriminator"):
        values[part] |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "hidden_size": 64}
    torch.manual_seed(0)
    plain = RTDModel(RTDConfig.from_dict(values)).cuda()
    fast = copy.deepcopy(plain)
    config = train_config(tf32=False, **flags)
    device = torch.device("cuda")
    assert set_execution(fast, config, device)["attention"] == flags["attention"]
    batch = random_batch(length=40).to(device)
    results = []  # without TF32, which `set_execution` has set
    for model in (plain, fast):
        masked = model.generator.compute_masked_loss(batch, is_sampled=False)
        found = model.compute_detection_loss(batch.input_ids, batch.input_mask, batch.labels)
        (masked.loss.sum() + found.loss).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([masked.loss.detach(), found.loss.detach(), *gradients])
    for actual, expected in zip(*reversed(results), strict=True):
        scale = float(expected.abs().max())
        torch.testing.assert_close(actual, expected, atol=2e-5 * max(scale, 1e-2), rtol=1e-4)

"""Golden figures in float32 on a GPU, with TF32 off (see tests/model/test_golden.py)."""

import pytest
import torch

from tests.conftest import set_tf32
from tests.model.test_golden import (
    MASKED_LANGUAGE_MODELS,
    check_masked_language_model,
    check_replaced_token_detection,
)

CUDA = torch.device("cuda")
# Triton takes heads of 32 and more; smaller ones have sdpa under "auto".
FLAGS = [
    {"kernels": "off"},
    {"attention": "eager", "compile": False},
    {"attention": "sdpa", "compile": False},
    {"attention": "auto"},
]
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")


@pytest.fixture(autouse=True)
def _full_float32():
    with set_tf32(False):
        yield


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("name", MASKED_LANGUAGE_MODELS)
def test_masked_language_model(name, flags):
    check_masked_language_model(name, CUDA, flags)


@pytest.mark.parametrize("flags", FLAGS)
def test_replaced_token_detection(flags):
    check_replaced_token_detection(CUDA, flags)

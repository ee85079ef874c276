"""Out of memory on a GPU is one sentence."""

import pytest
import torch

from DeBERTa.errors import MemoryLimitError
from DeBERTa.memory import translate_memory_errors

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")


def test_out_of_memory():
    with pytest.raises(MemoryLimitError, match=r"tried to allocate .*--accumulative_update") as error:
        allocate()
    assert "\n" not in str(error.value)


@translate_memory_errors()
def allocate() -> None:
    torch.empty(2**50, dtype=torch.uint8, device="cuda")

"""Compiled layers for tests."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partialmethod

import pytest
import torch
from torch import nn

from DeBERTa.errors import ConfigError
from DeBERTa.model.encoder import Layer
from DeBERTa.training.execution import check_compiler


def require_compiler() -> None:
    """Skip a test where `torch.compile` has no C++ compiler."""
    try:
        check_compiler(torch.device("cpu"))
    except ConfigError as error:
        pytest.skip(str(error))


@contextmanager
def compile_layers(backend: str) -> Iterator[None]:
    """Have layers compiled by `backend` of torch.compile, as one graph each: a break raises."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Layer, "compile", partialmethod(nn.Module.compile, backend=backend, fullgraph=True))
        yield

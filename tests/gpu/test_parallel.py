"""DDP and FSDP2 over NCCL with one rank, in bfloat16: losses are those of a model without them."""

import pytest
import torch
import torch.distributed as dist

from DeBERTa import MaskedLanguageModel, ModelConfig
from DeBERTa.training.execution import set_execution
from DeBERTa.training.optimizer import build_optimizer
from DeBERTa.training.parallel import Objective, order_by_gradient, replicate, shard
from tests.conftest import tiny_model
from tests.training.batches import random_batch, train_config

DEVICE, BACKEND = torch.device("cuda"), "nccl"
SIZE = {"hidden_size": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")


@pytest.fixture
def _one_rank(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group(BACKEND, store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def train(mode: str, flags: dict) -> list[float]:
    """Return the losses of four steps."""
    torch.manual_seed(0)
    model = MaskedLanguageModel(ModelConfig.from_dict(tiny_model() | SIZE)).to(DEVICE)
    # TF32 is a setting of the process: also of the tests that follow.
    config = train_config(sharding=mode or "none", tf32=False, **flags)
    set_execution(model, config, DEVICE)
    objective: torch.nn.Module = Objective(model)
    if mode == "none":
        objective = replicate(Objective(model), order_by_gradient(model))
    elif mode:
        objective = shard(Objective(model), config, DEVICE, torch.bfloat16)
    optimizer = build_optimizer([(model, 1e-3)], config)
    losses = []
    for step in range(4):
        batch = random_batch(seed=step % 2).to(DEVICE)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss = objective(model.compute_masked_loss, batch, is_sampled=False).loss.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize(
    ("mode", "flags"),
    [("none", {}), ("none", {"compile": False}), ("zero2", {"compile": False}), ("fsdp", {})],
)
def test_one_rank(mode, flags):
    # FSDP rounds the weights of LayerNorm to bfloat16; matmuls round every product.
    assert train(mode, flags) == pytest.approx(train("", flags), rel=1e-3)

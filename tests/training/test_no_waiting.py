"""Forward and backward of a step never wait for the device.

They run on the "meta" device, where tensors have shapes but no values: reading a value, or a size that
depends on values, raises there. A copy between host and device that is not asynchronous needs no value and
waits all the same: those are listed. Kernels that wait inside, if there are any, only a GPU can show.
"""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from DeBERTa import MaskedLanguageModel, ModelConfig, RTDConfig, RTDModel
from DeBERTa.training.execution import set_execution
from DeBERTa.training.steps import MaskedLMStep, ReplacedTokenStep, TrainingStep
from tests.conftest import tiny_model, tiny_rtd
from tests.training.batches import random_batch, train_config

META = torch.device("meta")
CONVOLUTION = {"conv_kernel_size": 3}
PLAIN = {"position_biased_input": True, "relative_attention": False, "norm_rel_ebd": "none"}


class Copies(TorchDispatchMode):
    """List for each copy from one device to another whether it is asynchronous."""

    def __init__(self) -> None:
        super().__init__()
        self.asynchronous: list[bool] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operation is torch.ops.aten._to_copy.default:  # noqa: SLF001 (the operator's public name)
            target = kwargs.get("device") or args[0].device
            if target != args[0].device:
                self.asynchronous.append(kwargs.get("non_blocking", False))
        elif operation is torch.ops.aten.copy_.default and args[0].device != args[1].device:
            self.asynchronous.append(len(args) > 2 and args[2])
        return operation(*args, **kwargs)


def remove_update(step: type[TrainingStep]) -> type[TrainingStep]:
    """Return the step without its update, which reads whether everything is finite."""

    class Gradients(step):
        def update(self, *_: object) -> bool:
            return True

    return Gradients


def build_on_meta(task: str, sharing: str, change: dict) -> nn.Module:
    if task == "MLM":
        return MaskedLanguageModel(ModelConfig.from_dict(tiny_model() | change)).to(META)
    values = tiny_rtd(sharing)
    models = {
        name: values[name] | {"num_hidden_layers": 2} | change for name in ("generator", "discriminator")
    }
    return RTDModel(RTDConfig.from_dict(values | models)).to(META)


@pytest.mark.parametrize(
    ("task", "sharing", "change", "flags"),
    [
        ("MLM", "", {}, {}),
        ("MLM", "", PLAIN, {}),
        ("MLM", "", CONVOLUTION, {"attention": "eager", "accumulative_update": 2}),
        ("RTD", "gdes", {}, {}),
        ("RTD", "gdes", {}, {"attention": "sdpa"}),
        ("RTD", "gdes", {}, {"kernels": "off"}),
        ("RTD", "nes", {}, {"gradient_checkpointing": True}),
        ("RTD", "es", {}, {"attention": "eager"}),
        ("RTD", "gdes", {}, {"decoupled_training": False}),
    ],
)
def test_a_step_never_waits(task, sharing, change, flags, monkeypatch):
    config = train_config(task_name=task, **flags)
    model = build_on_meta(task, sharing, change)
    set_execution(model, config, META)
    # autocast knows real devices only.
    monkeypatch.setattr("DeBERTa.training.steps.autocast", lambda *_: torch.autocast("cpu", enabled=False))
    step = remove_update(MaskedLMStep if task == "MLM" else ReplacedTokenStep)
    training = step(model, config, "fp32", META, total_steps=10)
    with Copies() as copies:
        sums = training(random_batch())
    assert len(copies.asynchronous) >= 7
    assert all(copies.asynchronous)
    assert sums
    assert all(tensor.device == META for tensor in sums.values())
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    # Under GDES no loss reaches a discriminator's positions: they enter the generator's decoder only.
    assert [
        name for name in missing if "discriminator.deberta.embeddings.position_embeddings" not in name
    ] == []


def test_what_waits_is_found():
    """The public forward pass picks real positions with a mask: fine there, and raised here."""
    model, batch = build_on_meta("RTD", "gdes", {}), random_batch().to(META)
    with pytest.raises(NotImplementedError, match="nonzero"):
        model.discriminate(batch.input_ids, batch.input_mask, batch.labels)
    with pytest.raises(RuntimeError, match="item"):
        model.generator.generate(batch).corrupted_ids.sum().item()
    with Copies() as copies:
        torch.zeros(3).to(META)
        torch.zeros(3).to(META, non_blocking=True)
    assert copies.asynchronous == [False, True]

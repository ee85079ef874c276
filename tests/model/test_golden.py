"""Golden figures: values and gradients of the published implementation (see tests/golden/README.md)."""

import json

import numpy as np
import pytest
import torch

from DeBERTa import MaskedLanguageModel, ModelConfig, RTDConfig, RTDModel
from DeBERTa.data.batch import Batch
from DeBERTa.training.execution import select_kernels
from tests.conftest import GOLDEN, PATHS
from tests.training.batches import train_config

CPU = torch.device("cpu")
FORWARD, GRADIENT = 1e-5, 1e-4  # float32 rounding over a few layers; gradients relative to each tensor's norm
ROUNDING = 1e-6  # norm of a gradient that is zero in exact arithmetic


class Golden:
    """Inputs, weights and figures of one model of the published code, on `device`."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.arrays = np.load(GOLDEN / f"{name}.npz")
        self.config = json.loads(str(self.arrays["config"]))
        self.device = device

    def __getitem__(self, key: str) -> torch.Tensor:
        return torch.from_numpy(self.arrays[key]).to(self.device)

    def read_group(self, prefix: str) -> dict[str, torch.Tensor]:
        return {k.removeprefix(prefix): self[k] for k in self.arrays.files if k.startswith(prefix)}

    def read_inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self["in/input_ids"], self["in/input_mask"], self["in/labels"]


def assert_forward(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare by absolute error, relative where values exceed 1."""
    error = (actual.detach() - expected).abs() / expected.abs().clamp(min=1)
    assert actual.shape == expected.shape
    assert error.max() <= FORWARD, f"largest error {error.max():.2e}"


def assert_gradients(model: torch.nn.Module, expected: dict[str, torch.Tensor]) -> None:
    """Compare every gradient of the published code, relative to its norm; zero there must be zero here.

    A bias added to every key shifts all scores of a query alike. Its true gradient is zero, and what both
    codes hold is rounding, below 1e-6 (other norms are 0.02 and more).
    """
    for name, parameter in model.named_parameters():
        actual = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        wanted = expected.get(name, torch.zeros_like(parameter))
        if wanted.norm() < ROUNDING:
            assert actual.norm() < ROUNDING, f"{name}: {actual.norm():.2e} where it should be zero"
            continue
        error = (actual - wanted).norm() / wanted.norm()
        assert error <= GRADIENT, f"{name}: relative error {error:.2e}"
    assert set(expected) <= {name for name, _ in model.named_parameters()}


MASKED_LANGUAGE_MODELS = ("mlm_bert", "mlm_deberta", "mlm_v1", "mlm_conv")


@pytest.mark.parametrize("name", MASKED_LANGUAGE_MODELS)
def test_masked_language_model(name, path):
    check_masked_language_model(name, CPU, PATHS[path])


def test_replaced_token_detection(path):
    check_replaced_token_detection(CPU, PATHS[path])


def check_masked_language_model(name: str, device: torch.device, flags: dict) -> None:
    """Compare hidden states, logits, losses and gradients, of the public forward pass and of training's."""
    golden = Golden(name, device)
    model = MaskedLanguageModel(ModelConfig.from_dict(golden.config)).eval().to(device)
    select_kernels(model, train_config(**flags), device)
    model.load_state_dict(golden.read_group("generator/"), strict=True)
    input_ids, input_mask, labels = golden.read_inputs()
    real = input_mask > 0

    hidden_states = model.deberta(input_ids, input_mask).hidden_states
    assert len(hidden_states) == golden.config["num_hidden_layers"]
    for layer, actual in enumerate(hidden_states):
        assert_forward(actual[real], golden[f"out/generator_hidden_{layer}"][real])

    out = model(input_ids, input_mask, labels)
    assert_forward(out.logits, golden["out/mlm_logits"])
    assert_forward(out.loss, golden["out/mlm_loss_per_token"])
    assert torch.equal(out.labels, labels[labels > 0])
    out.loss.mean().backward()
    assert_gradients(model, golden.read_group("grad_generator/"))

    # The path that training takes.
    model.zero_grad()
    inputs = [tensor.cpu() for tensor in (input_ids, input_mask, labels, torch.rand(labels.shape))]
    trained = model.compute_masked_loss(Batch.from_tensors(*inputs).to(device), is_sampled=False)
    assert_forward(trained.loss, golden["out/mlm_loss_per_token"])
    assert torch.equal(trained.correct, golden["out/mlm_logits"].argmax(-1) == out.labels)
    trained.loss.mean().backward()
    assert_gradients(model, golden.read_group("grad_generator/"))


def check_replaced_token_detection(device: torch.device, flags: dict) -> None:
    """Compare the generator's and discriminator's logits, losses and gradients."""
    golden = Golden("rtd_gdes", device)
    model = RTDModel(RTDConfig.from_dict(golden.config)).eval().to(device)
    select_kernels(model, train_config(**flags), device)
    model.generator.load_state_dict(golden.read_group("generator/"), strict=True)
    model.discriminator.load_state_dict(golden.read_group("discriminator/"), strict=True)
    input_ids, input_mask, labels = golden.read_inputs()

    out = model.generator(input_ids, input_mask, labels)
    assert_forward(out.logits, golden["out/mlm_logits"])
    out.loss.mean().backward()
    assert_gradients(model.generator, golden.read_group("grad_generator/"))
    model.zero_grad()

    out = model.discriminate(golden["in/corrupted_ids"], input_mask, labels)
    real = input_mask > 0
    assert_forward(out.logits[real], golden["out/rtd_logits"][real])
    assert torch.equal(out.labels, golden["out/rtd_labels"])
    assert_forward(out.loss, golden["out/rtd_loss_per_token"])
    assert_forward(out.loss.mean(), golden["out/rtd_loss"])
    out.loss.mean().backward()
    assert_gradients(model.discriminator, golden.read_group("grad_discriminator/"))
    assert all(parameter.grad is None for parameter in model.generator.parameters())

    # The path that training takes.
    model.zero_grad()
    trained = model.compute_detection_loss(golden["in/corrupted_ids"], input_mask, labels)
    assert_forward(trained.loss / real.sum(), golden["out/rtd_loss"])
    assert trained.correct == ((golden["out/rtd_logits"] > 0)[real] == (golden["out/rtd_labels"] > 0)).sum()
    (trained.loss / real.sum()).backward()
    assert_gradients(model.discriminator, golden.read_group("grad_discriminator/"))
    assert all(parameter.grad is None for parameter in model.generator.parameters())

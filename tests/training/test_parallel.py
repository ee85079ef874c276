"""What DDP reduces: parameters that have a gradient, in buckets that are the same after a resume."""

from pathlib import Path

import pytest
import torch

from DeBERTa import MaskedLanguageModel, ModelConfig, RTDConfig, RTDModel
from DeBERTa.data.batch import Batch
from DeBERTa.training.distributed import get_rank, is_rank_zero
from DeBERTa.training.parallel import load_full_weights, order_by_gradient
from tests.conftest import tiny_model, tiny_rtd
from tests.training.batches import random_batch
from tests.training.ranks import make_step, run_ranks, select_rows

RESUMED = ("gdes-in-2", "es")
UNMASKED = ("mlm-in-2", "gdes", "es")
STEPS = 4

WITHOUT_GRADIENT = [
    ("mlm", {}, set()),
    ("mlm", {"position_biased_input": True, "type_vocab_size": 2, "embedding_size": 16}, set()),
    (
        "mlm",
        {"pos_att_type": ""},
        {"encoder.rel_embeddings.weight", *(f"encoder.LayerNorm.{x}" for x in ("weight", "bias"))},
    ),
    ("gdes", {}, {"discriminator.deberta.embeddings.position_embeddings._weight"}),
    ("nes", {}, {"discriminator.deberta.embeddings.position_embeddings.weight"}),
    ("gdes", {"position_biased_input": True}, set()),
    ("es", {"conv_kernel_size": 3, "num_hidden_layers": 2}, set()),
]


@pytest.mark.parametrize(("case", "change", "expected"), WITHOUT_GRADIENT)
def test_parameters_without_gradient(case, change, expected):
    """Those that the meta device finds are those of a backward pass on a batch."""
    model: MaskedLanguageModel | RTDModel
    if case == "mlm":
        model = MaskedLanguageModel(ModelConfig.from_dict(tiny_model() | change))
        loss = model.compute_masked_loss(random_batch(), sample=False).loss.sum()
    else:
        values = tiny_rtd(case)
        parts = {name: values[name] | change for name in ("generator", "discriminator")}
        model = RTDModel(RTDConfig.from_dict(values | parts))
        generated, detected = model(random_batch())
        loss = generated.masked.loss.sum() + detected.loss
    ordered = order_by_gradient(model)
    assert len(set(ordered)) == len(ordered)
    without = {name for name, p in model.named_parameters() if p not in set(ordered)}
    assert {name.removeprefix("deberta.") for name in without} == expected
    loss.backward()
    assert without == {name for name, p in model.named_parameters() if p.grad is None}
    assert all(p.grad is None or p.grad.device.type == "cpu" for p in model.parameters())


def test_order_of_gradients():
    """Heads come first; the word table and the relative positions, which all layers share, come last."""
    model = RTDModel(RTDConfig.from_dict(tiny_rtd("gdes")))
    names = {p: name for name, p in model.named_parameters()}
    ordered = [names[p] for p in order_by_gradient(model)]
    for model_name, head in (("discriminator", "mask_predictions"), ("generator", "lm_predictions")):
        own = [name.removeprefix(f"{model_name}.") for name in ordered if name.startswith(model_name)]
        assert own[0].startswith(head)
        table = own.index("deberta.encoder.rel_embeddings.weight")
        assert not any(".layer." in name for name in own[table:])


def train(case: str, first: int, last: int, state: dict | None = None) -> dict:
    """Take steps `first` to `last` - 1 with DDP; return weights and training state."""
    model, training = make_step(case)
    if first:
        load_full_weights(model, state["weights"] if state else None)
        training.load_state_dict(state["training"] if state else None)
    for step in range(first, last):
        training.set_learning_rate(step + 1)
        training(select_rows(seed=step))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return {"weights": weights, "training": training.state_dict()}


def resume_all(folder: Path) -> None:
    for case in RESUMED:
        full, half = train(case, 0, STEPS), train(case, 0, STEPS // 2)
        resumed = train(case, STEPS // 2, STEPS, half if is_rank_zero() else None)
        if is_rank_zero():
            torch.save((full, resumed), folder / f"{case}.pt")


def test_three_ranks_resume_with_the_same_bits(tmp_path):
    """Sums of three depend on their order, and so on the buckets."""
    run_ranks(3, tmp_path, resume_all, tmp_path)
    for case in RESUMED:
        full, resumed = torch.load(tmp_path / f"{case}.pt", weights_only=True)
        for name, weight in full["weights"].items():
            assert torch.equal(resumed["weights"][name], weight), name
        for name, optimizer in full["training"]["optimizers"].items():
            later = resumed["training"]["optimizers"][name]["state"]
            assert later.keys() == optimizer["state"].keys()
            for index, moments in optimizer["state"].items():
                assert torch.equal(later[index]["exp_avg"], moments["exp_avg"])


def train_without_masked(folder: Path) -> None:
    """Rank 1 has no masked token in the first of two steps."""
    for case in UNMASKED:
        model, training = make_step(case)
        for step in (1, 2):
            training.set_learning_rate(step)
            batch = random_batch(2, seed=step)
            if get_rank() == 1 and step == 1:
                batch = Batch.from_tensors(*batch[:2], torch.zeros_like(batch.labels), batch.uniforms)
            training(batch)
        if is_rank_zero():
            assert all(bool(weight.isfinite().all()) for weight in model.state_dict().values()), case
            (folder / case).touch()


def test_rank_without_masked_tokens(tmp_path):
    """All parameters have a gradient, which is zero: no rank waits for another."""
    run_ranks(2, tmp_path, train_without_masked, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= set(UNMASKED)

"""Where the gradients go under GDES, ES and NES, in decoupled and joint training (DeBERTaV3, section 3.3)."""

import pytest
import torch

from DeBERTa import ReplacedTokenDetectionModel, RTDConfig, RTDModel
from DeBERTa.model.sharing import TiedLookup
from DeBERTa.training.steps import ReplacedTokenStep
from tests.conftest import set_threads, tiny_rtd
from tests.training.batches import random_batch, train_config


def make(sharing: str) -> RTDModel:
    torch.manual_seed(0)
    config = tiny_rtd(sharing)
    for part in ("generator", "discriminator"):
        # Positions reach the input: their tables get gradients too. No dropout: losses repeat.
        config[part] |= {
            "position_biased_input": True,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        }
    return RTDModel(RTDConfig.from_dict(config))


def find_tables(model: RTDModel) -> dict[str, torch.Tensor]:
    """Return the embedding tables by owner and name."""
    return {name: p for name, p in model.named_parameters() if "_embeddings." in name and "rel_" not in name}


def compute_losses(model: RTDModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean losses of generator and discriminator."""
    batch = random_batch()
    generated, detected = model(batch, is_per_token=True)
    return generated.masked.loss.mean(), detected.loss.mean()


def find_reached(loss: torch.Tensor, model: RTDModel) -> set[str]:
    """Return the names of tables with a gradient that is not exactly zero."""
    found = find_tables(model)
    gradients = torch.autograd.grad(loss, list(found.values()), allow_unused=True)
    return {
        name for name, g in zip(found, gradients, strict=True) if g is not None and torch.count_nonzero(g)
    }


def name_both(owner: str, name: str) -> set[str]:
    return {f"{owner}.deberta.embeddings.{table}_embeddings.{name}" for table in ("word", "position")}


@pytest.mark.parametrize(
    ("sharing", "mlm_tables", "rtd_tables"),
    [
        ("gdes", name_both("generator", "weight"), name_both("discriminator", "_weight")),
        ("es", name_both("generator", "weight"), name_both("generator", "weight")),
        ("nes", name_both("generator", "weight"), name_both("discriminator", "weight")),
    ],
)
def test_tables_each_loss_reaches(sharing, mlm_tables, rtd_tables):
    model = make(sharing)
    mlm_loss, rtd_loss = compute_losses(model)
    assert set(find_tables(model)) == mlm_tables | rtd_tables
    assert find_reached(mlm_loss, model) == mlm_tables
    assert find_reached(rtd_loss, model) == rtd_tables


def test_gdes_starts_at_the_generators_table_and_follows_it():
    model = make("gdes")
    word = model.discriminator.deberta.embeddings.word_embeddings
    ids = torch.arange(10)
    base = model.get_shared_tables().word
    assert torch.equal(word(ids, base), base[:10])
    with torch.no_grad():
        word.get_parameter("_weight")[3] += 1.0
        base[5] += 2.0
    merged = model.merge_discriminator()["deberta.embeddings.word_embeddings.weight"]
    assert torch.equal(word(ids, base), merged[:10])
    assert torch.equal(word(ids, base)[3], base[3] + 1.0)


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("sharing", ["gdes", "es", "nes"])
def test_gradients_at_the_update(sharing, decoupled):
    """The gradients that the optimizers step on equal those of the losses, computed one by one."""
    model = make(sharing)
    config = train_config(
        task_name="RTD", decoupled_training=decoupled, learning_rate=1e-30, max_grad_norm=0.0
    )
    training = ReplacedTokenStep(model, config, "fp32", torch.device("cpu"), total_steps=10)
    assert training.is_decoupled == (decoupled and sharing != "es")
    training.set_learning_rate(1)
    seen: dict[str, torch.Tensor] = {}

    def record(optimizer: torch.optim.Optimizer, *_: object) -> None:
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
        found = {
            n: p.grad.clone() for n, p in find_tables(model).items() if id(p) in mine and p.grad is not None
        }
        assert not seen.keys() & found.keys(), "a table is updated once in a step"
        seen.update(found)

    for optimizer in training.optimizers.values():
        optimizer.register_step_pre_hook(record)
    torch.manual_seed(1)
    training(random_batch())

    torch.manual_seed(1)
    mlm_loss, rtd_loss = compute_losses(model)
    found = find_tables(model)
    alone = [
        torch.autograd.grad(loss, list(found.values()), allow_unused=True) for loss in (mlm_loss, rtd_loss)
    ]
    for name, mlm, rtd in zip(found, *alone, strict=True):
        parts = [g for g in (mlm, None if rtd is None else config.rtd_lambda * rtd) if g is not None]
        torch.testing.assert_close(seen[name], sum(parts), atol=1e-6, rtol=1e-4)
        assert (len(parts) == 2) == (sharing == "es")


def test_standalone_discriminator_shares_nothing():
    """The saved discriminator gives the same logits as the one that shares tables."""
    for sharing in ("gdes", "es", "nes"):
        model = make(sharing)
        with torch.no_grad():
            for parameter in find_tables(model).values():
                parameter += 0.1 * torch.randn_like(parameter)
        batch = random_batch()
        alone = ReplacedTokenDetectionModel(model.config.discriminator)
        alone.load_state_dict(model.merge_discriminator(), strict=True)
        expected = model.discriminate(batch.input_ids, batch.input_mask, batch.labels).logits
        torch.testing.assert_close(alone(batch.input_ids, batch.input_mask, batch.labels).logits, expected)


@pytest.mark.parametrize("threads", [2, 4])
def test_lookup_gradients_are_the_same_bits_on_several_threads(threads):
    """Many rows of one id, as of [MASK], are added in the same order every time."""
    torch.manual_seed(0)
    table, ids = torch.randn(3000, 64, requires_grad=True), torch.randint(0, 3000, (64, 512))
    ids[:, ::2] = 7  # half of 32,768 rows, of which each thread has some
    weights, table_weights = torch.randn(64, 512, 64), torch.randn(3000, 64)
    results = []
    with set_threads(threads):
        for _ in range(8):
            rows, full = TiedLookup.apply(table, ids)
            loss = (rows * weights).sum() + (full * table_weights).sum()
            results.append(torch.autograd.grad(loss, table)[0])
    assert all(torch.equal(result, results[0]) for result in results[1:])

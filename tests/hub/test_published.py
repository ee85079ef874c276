"""Weights of others: tables of a discriminator in every form, names of other code, files that do not fit."""

import copy
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    DebertaConfig,
    DebertaForMaskedLM,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    DebertaV2Model,
)

from DeBERTa import MaskedLanguageModel, ModelConfig, ReplacedTokenDetectionModel, RTDConfig, RTDModel
from DeBERTa.errors import ConfigError
from DeBERTa.hub.published import FROM_DISCRIMINATOR, LoadOptions, load_masked_lm, load_rtd, set_residual
from tests.conftest import GOLDEN, TINY, tiny_model, tiny_rtd
from tests.training.batches import random_batch

WORD = "deberta.embeddings.word_embeddings"
POSITION = "deberta.embeddings.position_embeddings"
FRESH = LoadOptions(fresh_head=True)


def disturb(model: torch.nn.Module) -> torch.nn.Module:
    """Move all weights away from their initial values."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture
def published(tmp_path):
    """Return a directory with a generator, a discriminator, and its residuals."""
    torch.manual_seed(1)
    model = disturb(RTDModel(RTDConfig.from_dict(tiny_rtd())))
    discriminator = disturb(ReplacedTokenDetectionModel(model.config.discriminator))
    torch.save(model.generator.state_dict(), tmp_path / "pytorch_model.generator.bin")
    residuals = {}
    for name, base in zip((WORD, POSITION), model.generator.get_tables(), strict=True):
        residuals[name] = 0.05 * torch.randn_like(base)
        discriminator.get_parameter(f"{name}.weight").data = (base + residuals[name]).detach()
    return tmp_path, discriminator, residuals


def iterate_variants(state, residuals):
    """Yield the state dicts that published checkpoints may hold."""
    body = {k: v for k, v in state.items() if not k.startswith((WORD, POSITION))}
    head = {
        "lm_predictions.lm_head.bias": torch.zeros(3),
        "deberta.embeddings.position_ids": torch.arange(4)[None],
    }
    tables = {f"{WORD}.weight": state[f"{WORD}.weight"], f"{POSITION}.weight": state[f"{POSITION}.weight"]}
    residual = {f"{name}._weight": tensor for name, tensor in residuals.items()}
    yield "tables", body | tables
    yield "table, other head, no positions", body | head | {f"{WORD}.weight": state[f"{WORD}.weight"]}
    yield "residual", body | residual
    yield "both", body | tables | residual


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
@pytest.mark.parametrize("sharing", ["gdes", "nes"])
def test_discriminator_starts_exactly_as_published(published, sharing, suffix):
    directory, discriminator, residuals = published
    batch = random_batch()
    expected = discriminator(batch.input_ids, batch.input_mask, batch.labels).logits
    for name, state in iterate_variants(discriminator.state_dict(), residuals):
        path = directory / f"pytorch_model.{suffix}"
        (torch.save if suffix == "bin" else save_file)(copy.deepcopy(state), path)
        model = RTDModel(RTDConfig.from_dict(tiny_rtd(sharing))).eval()
        loaded = load_rtd(model, directory / "pytorch_model.generator.bin", path)["discriminator"]
        actual = model.discriminate(batch.input_ids, batch.input_mask, batch.labels).logits
        assert torch.equal(actual, expected), name
        used = {key.replace("._weight", ".weight") for key in state if not key.startswith("lm_")}
        assert loaded.loaded == len(used - {"deberta.embeddings.position_ids"})
        assert loaded.new == ()
        if sharing == "gdes":
            torch.testing.assert_close(
                model.discriminator.state_dict()[f"{WORD}._weight"], residuals[WORD], atol=1e-6, rtol=0
            )


@pytest.mark.parametrize("has_residual", [True, False])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_table_that_is_a_sum_is_restored_bitwise(scale, has_residual):
    generator = torch.Generator().manual_seed(5)
    base = torch.randn(5000, 40, generator=generator)
    residual = scale * torch.randn(5000, 40, generator=generator)
    table = base + residual
    target = torch.empty_like(base)
    set_residual(target, base, table, residual if has_residual else None)
    assert torch.equal(base + target, table)


def test_half_precision_files_are_restored_bitwise(published):
    """Differences of two float16 values below 1 are exact in float32."""
    directory, discriminator, _ = published
    path = directory / "pytorch_model.generator.bin"
    torch.save({k: v.half() for k, v in torch.load(path).items()}, path)
    state = {k: v.half() for k, v in discriminator.state_dict().items()}
    torch.save(state, directory / "pytorch_model.bin")
    model = RTDModel(RTDConfig.from_dict(tiny_rtd())).eval()
    load_rtd(model, path, directory / "pytorch_model.bin")
    discriminator.load_state_dict(state)
    batch = random_batch()
    inputs = (batch.input_ids, batch.input_mask, batch.labels)
    assert torch.equal(model.discriminate(*inputs).logits, discriminator(*inputs).logits)


def test_es_takes_the_tables_of_the_generator(published):
    directory, discriminator, _ = published
    torch.save(discriminator.state_dict(), directory / "d.bin")
    model = RTDModel(RTDConfig.from_dict(tiny_rtd("es")))
    loaded = load_rtd(model, directory / "pytorch_model.generator.bin", directory / "d.bin")["discriminator"]
    assert {f"{WORD}.weight", f"{POSITION}.weight"} == set(loaded.ignored)


@pytest.mark.parametrize("sharing", ["gdes", "nes", "es"])
def test_a_checkpoint_of_an_rtd_run(sharing, tmp_path):
    torch.manual_seed(2)
    trained = disturb(RTDModel(RTDConfig.from_dict(tiny_rtd(sharing))))
    torch.save(trained.state_dict(), tmp_path / "model.bin")
    model = RTDModel(trained.config).eval()
    loaded = load_rtd(model, tmp_path / "model.bin", tmp_path / "model.bin")
    assert not loaded["generator"].ignored
    batch = random_batch()
    inputs = (batch.input_ids, batch.input_mask, batch.labels)
    assert torch.equal(model.discriminate(*inputs).logits, trained.discriminate(*inputs).logits)
    assert torch.equal(model.generator(*inputs).logits, trained.generator(*inputs).logits)
    with pytest.raises(ConfigError, match="holds a generator and a discriminator: --init_model takes one"):
        load_masked_lm(MaskedLanguageModel(ModelConfig.from_dict(tiny_model())), tmp_path / "model.bin")


@pytest.mark.parametrize("name", ["mlm_bert", "mlm_deberta", "mlm_v1", "mlm_conv"])
def test_golden_weights(name, tmp_path):
    """The published implementation's weights and its loss, which is far from that of random weights."""
    golden = np.load(GOLDEN / f"{name}.npz")
    state = {k.removeprefix("generator/"): golden[k] for k in golden.files if k.startswith("generator/")}
    torch.save({k: torch.from_numpy(v) for k, v in state.items()}, tmp_path / "model.bin")
    model = MaskedLanguageModel(ModelConfig.from_dict(json.loads(str(golden["config"])))).eval()
    loaded = load_masked_lm(model, tmp_path / "model.bin")
    assert (loaded.loaded, loaded.new, loaded.ignored) == (len(state), (), ())
    inputs = [torch.from_numpy(golden[f"in/{k}"]) for k in ("input_ids", "input_mask", "labels")]
    expected = torch.from_numpy(golden["out/mlm_loss_per_token"])
    torch.testing.assert_close(model(*inputs).loss, expected, atol=1e-5, rtol=1e-5)


def test_golden_pair(tmp_path):
    golden = np.load(GOLDEN / "rtd_gdes.npz")
    for role in ("generator", "discriminator"):
        state = {
            k.removeprefix(f"{role}/"): torch.from_numpy(golden[k])
            for k in golden.files
            if k.startswith(f"{role}/")
        }
        torch.save(state, tmp_path / f"{role}.bin")
    model = RTDModel(RTDConfig.from_dict(json.loads(str(golden["config"])))).eval()
    load_rtd(model, tmp_path / "generator.bin", tmp_path / "discriminator.bin")
    inputs = [torch.from_numpy(golden[f"in/{k}"]) for k in ("corrupted_ids", "input_mask", "labels")]
    real = inputs[1] > 0
    expected = torch.from_numpy(golden["out/rtd_logits"])
    torch.testing.assert_close(model.discriminate(*inputs).logits[real], expected[real], atol=1e-5, rtol=1e-5)


SMALL = {
    "vocab_size": 90,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 40,
    "relative_attention": True,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.3,
}
BUCKETS = {"position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True}


def save_transformers(model, directory, suffix: str = "safetensors") -> ModelConfig:
    """Save as transformers does, and return the config that it wrote, read here."""
    disturb(model).save_pretrained(directory)
    if suffix == "bin":
        torch.save(model.state_dict(), directory / "pytorch_model.bin")
    return ModelConfig.from_json(directory / "config.json")


def compare_hidden_states(theirs, ours: MaskedLanguageModel) -> None:
    ids = torch.randint(4, 90, (3, 20))
    mask = torch.ones_like(ids)
    mask[1, 10:] = 0
    with torch.no_grad():
        expected = theirs(ids, mask, output_hidden_states=True).hidden_states
        actual = ours.deberta(ids, mask).hidden_states
    for layer, wanted in zip(actual, expected[1:], strict=True):
        torch.testing.assert_close(layer[mask > 0], wanted[mask > 0], atol=1e-5, rtol=1e-5)


def compare_logits(theirs, ours: MaskedLanguageModel) -> None:
    ids = torch.randint(4, 90, (3, 20))
    mask, labels = torch.ones_like(ids), torch.zeros_like(ids)
    labels[:, 3:7] = 5
    with torch.no_grad():
        expected = theirs(ids, mask).logits[labels > 0]
        torch.testing.assert_close(ours(ids, mask, labels).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
@pytest.mark.parametrize("terms", [["p2c", "c2p"], ["c2p"], ["p2c"]])
def test_transformers_v2_with_either_mlm_head(tmp_path, terms, suffix):
    """With position-biased input their MLM head computes what ours does."""
    torch.manual_seed(3)
    for legacy in (True, False):
        directory = tmp_path / str(legacy)
        settings = SMALL | BUCKETS | {"pos_att_type": terms, "position_biased_input": True, "legacy": legacy}
        theirs = DebertaV2ForMaskedLM(DebertaV2Config(**settings))
        config = save_transformers(theirs, directory, suffix)
        ours = MaskedLanguageModel(config).eval()
        name = "pytorch_model.bin" if suffix == "bin" else "model.safetensors"
        loaded = load_masked_lm(ours, directory / name)
        assert (loaded.new, loaded.ignored) == ((), ())
        compare_hidden_states(theirs, ours)
        compare_logits(theirs, ours)


@pytest.mark.parametrize("terms", [["p2c", "c2p"], ["c2p"], ["p2c"]])
def test_transformers_v1_with_joint_projection(tmp_path, terms):
    torch.manual_seed(4)
    settings = SMALL | {"pos_att_type": terms, "position_biased_input": True}
    theirs = DebertaForMaskedLM(DebertaConfig(**settings))
    ours = MaskedLanguageModel(save_transformers(theirs, tmp_path)).eval()
    loaded = load_masked_lm(ours, tmp_path / "model.safetensors")
    assert (loaded.new, loaded.ignored) == ((), ())
    compare_hidden_states(theirs, ours)
    compare_logits(theirs, ours)


@pytest.mark.parametrize("prefix", ["", "bert.", "deberta.", "module.deberta."])
def test_an_encoder_alone_and_its_prefixes(tmp_path, prefix):
    torch.manual_seed(5)
    settings = SMALL | BUCKETS | {"pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
    theirs = DebertaV2Model(DebertaV2Config(**settings))
    config = save_transformers(theirs, tmp_path)
    ours = MaskedLanguageModel(config).eval()
    state = {prefix + name: tensor for name, tensor in theirs.state_dict().items()}
    torch.save(state, tmp_path / "model.bin")
    with pytest.raises(ConfigError, match=r"no LM head and no position table \(.* --fresh_head"):
        load_masked_lm(ours, tmp_path / "model.bin")
    loaded = load_masked_lm(ours, tmp_path / "model.bin", FRESH)
    assert loaded.new == ("LM head", "position table")
    compare_hidden_states(theirs, ours)


def test_an_untied_head_is_refused(tmp_path):
    settings = SMALL | BUCKETS | {"pos_att_type": ["c2p"], "position_biased_input": True}
    theirs = DebertaV2ForMaskedLM(DebertaV2Config(**settings))
    config = save_transformers(theirs, tmp_path)
    state = theirs.state_dict() | {"cls.predictions.decoder.weight": torch.zeros(90, 24)}
    torch.save(state, tmp_path / "model.bin")
    with pytest.raises(ConfigError, match="matrix of its own"):
        load_masked_lm(MaskedLanguageModel(config), tmp_path / "model.bin")


def test_a_generator_from_the_discriminator(published):
    """First layers and tables; the LM head that the file holds; what it lacks starts new."""
    directory, discriminator, _ = published
    state = discriminator.state_dict()
    head = {
        f"lm_predictions.lm_head.{name}": torch.randn(shape)
        for name, shape in (
            ("dense.weight", (32, 32)),
            ("dense.bias", (32,)),
            ("LayerNorm.weight", (32,)),
            ("LayerNorm.bias", (32,)),
            ("bias", (2008,)),
        )
    }
    del state[f"{POSITION}.weight"]
    for more, new in ((head, ("position table",)), ({}, ("LM head", "position table"))):
        torch.save(state | more, directory / "pytorch_model.bin")
        model = RTDModel(RTDConfig.from_dict(tiny_rtd())).eval()
        loaded = load_rtd(model, FROM_DISCRIMINATOR, directory / "pytorch_model.bin")
        assert loaded["generator"].new == new
        generator = model.generator.state_dict()
        assert all(torch.equal(generator[name], tensor) for name, tensor in more.items())
        for name, tensor in state.items():
            if name.startswith("deberta.") and ".layer.1." not in name:
                assert torch.equal(generator[name], tensor)
        batch = random_batch()
        inputs = (batch.input_ids, batch.input_mask, batch.labels)
        assert torch.equal(model.discriminate(*inputs).logits, discriminator(*inputs).logits)
    torch.save(
        {k.replace("word_embeddings.w", "word_embeddings._w"): v for k, v in state.items()},
        directory / "r.bin",
    )
    with pytest.raises(ConfigError, match="needs the full table"):
        load_rtd(model, FROM_DISCRIMINATOR, directory / "r.bin")


def test_an_encoder_without_rtd_head(published):
    directory, discriminator, _ = published
    state = {k: v for k, v in discriminator.state_dict().items() if k.startswith("deberta.")}
    torch.save(state, directory / "encoder.bin")
    model = RTDModel(RTDConfig.from_dict(tiny_rtd()))
    paths = (FROM_DISCRIMINATOR, directory / "encoder.bin")
    with pytest.raises(ConfigError, match="no RTD head"):
        load_rtd(model, *paths)
    assert load_rtd(model, *paths, FRESH)["discriminator"].new == ("RTD head",)


def test_swapped_files_are_named(published):
    directory, discriminator, _ = published
    torch.save(discriminator.state_dict(), directory / "d.bin")
    paths = (directory / "d.bin", directory / "pytorch_model.generator.bin")
    with pytest.raises(ConfigError, match=r"swapped: .*d\.bin holds the discriminator"):
        load_rtd(RTDModel(RTDConfig.from_dict(tiny_rtd())), *paths)
    same_depth = tiny_rtd() | {"discriminator": TINY | {"num_hidden_layers": 1}}
    model = RTDModel(RTDConfig.from_dict(same_depth))
    for part, path in ((model.generator, "g.bin"), (model.discriminator, "d.bin")):
        torch.save(part.state_dict(), directory / path)
    with pytest.raises(ConfigError, match="swapped"):
        load_rtd(model, directory / "d.bin", directory / "g.bin")
    load_rtd(model, directory / "g.bin", directory / "d.bin")


def test_weights_that_do_not_fit_are_named(published):
    directory, discriminator, _ = published
    generator, path = directory / "pytorch_model.generator.bin", directory / "pytorch_model.bin"
    model = RTDModel(RTDConfig.from_dict(tiny_rtd()))
    query = "deberta.encoder.layer.1.attention.self.query_proj.weight"
    layer = {name: None for name in discriminator.state_dict() if ".layer.1." in name}
    not_finite = torch.zeros(32, 32).fill_diagonal_(float("nan"))
    for change, named in (
        (
            {"mask_predictions.dense.weight": None},
            r"no RTD head \(mask_predictions.dense.weight is missing\)",
        ),
        ({"deberta.encoder.layer.1.x": torch.zeros(1)}, "deberta.encoder.layer.1.x is not part"),
        (
            {"deberta.encoder.layer.2.x": torch.zeros(1)},
            "num_hidden_layers is 3, but that of the discriminator .* is 2",
        ),
        (layer, "num_hidden_layers is 1, but that of the discriminator .* is 2"),
        ({query: None}, rf"{query} is missing; "),
        ({f"module.{query}": torch.zeros(32, 32)}, rf"two tensors for {query}: it is unclear which"),
        ({f"{WORD}.weight": None}, r"word_embeddings\.weight is missing"),
        ({f"{WORD}.weight": torch.zeros(7, 32)}, r"\[7, 32\], the model needs \[2008, 32\]"),
        ({query: torch.zeros(16, 32)}, rf"{query} has shape \[16, 32\], the model needs \[32, 32\]"),
        ({query: torch.zeros(32, 32, dtype=torch.int8)}, rf"{query} is not a dense tensor of 16, 32"),
        ({query: torch.zeros(32, 32).to(torch.float8_e4m3fn)}, rf"{query} is not a dense tensor of 16, 32"),
        ({query: torch.zeros(32, 32).to_sparse()}, rf"{query} is not a dense tensor of 16, 32"),
        (
            {query: not_finite},
            rf"pytorch_model\.bin cannot be used: 32 of 1024 values of {query} are NaN",
        ),
        (
            {query: torch.full((32, 32), 1e300, dtype=torch.float64)},
            rf"1024 of 1024 values of {query} are NaN",
        ),
    ):
        state = {k: v for k, v in (discriminator.state_dict() | change).items() if v is not None}
        torch.save(state, path)
        with pytest.raises(ConfigError, match=named):
            load_rtd(model, generator, path)

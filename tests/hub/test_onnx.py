"""The encoder for ONNX: its graph, and in onnxruntime, which tests/slow/test_onnx.py installs."""

import pytest
import torch

from DeBERTa.hub.export import list_models
from DeBERTa.hub.onnx import DYNAMIC_SHAPES, EXAMPLE, build_encoder, write_encoder
from tests.hub.exported import VARIANTS, build_model

SHAPES = [(1, 1), (1, 7), (3, 17), (2, 300), (5, 64)]


@pytest.mark.parametrize("variant", ["deberta-v3", "few-distances", "bert"])
def test_graph(variant):
    """`torch.export` keeps batch size and length dynamic; this needs no package of ONNX."""
    exported = list_models(build_model(variant))[0]
    encoder = build_encoder(exported.weights, exported.config)
    shapes = tuple(dict.fromkeys(shape, torch.export.Dim.DYNAMIC) for shape in DYNAMIC_SHAPES)
    graph = torch.export.export(encoder, EXAMPLE, dynamic_shapes=shapes).module()
    generator = build_model(variant).generator.deberta
    for batch, length in SHAPES[1:]:
        input_ids = torch.randint(4, 2000, (batch + 1, length))
        mask = torch.ones_like(input_ids)
        with torch.no_grad():
            expected = generator.compute_last_hidden_state(input_ids, mask)
            torch.testing.assert_close(graph(input_ids, mask), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_encoder(tmp_path, variant):
    """Real positions agree to 1e-4 at every batch size and length, with padding."""
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    exported = list_models(build_model(variant))[1]
    write_encoder(exported.weights, exported.config, tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    model = build_model(variant)
    for batch, length in SHAPES:
        input_ids = torch.randint(4, 2000, (batch, length))
        mask = torch.ones_like(input_ids)
        mask[-1, length // 2 + 1 :] = 0
        inputs = {"input_ids": input_ids.numpy(), "attention_mask": mask.numpy()}
        actual = torch.from_numpy(session.run(["last_hidden_state"], inputs)[0])
        with torch.no_grad():
            expected = model.discriminator.deberta.compute_last_hidden_state(
                input_ids, mask, model.generator.get_tables()
            )
        assert actual.shape == expected.shape
        torch.testing.assert_close(actual[mask > 0], expected[mask > 0], atol=1e-4, rtol=0)

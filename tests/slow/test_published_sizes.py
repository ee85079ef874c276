"""Files of the published shapes: xsmall and small in full, the memory that base takes, large on meta."""

import gc
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from DeBERTa import MaskedLanguageModel, ModelConfig, ReplacedTokenDetectionModel, RTDConfig, RTDModel
from DeBERTa.hub.published import FROM_DISCRIMINATOR, load_masked_lm, load_rtd
from tests.conftest import ROOT
from tests.training.batches import random_batch

WORD = "deberta.embeddings.word_embeddings"
CONFIGS = {
    "xsmall": "rtd_xsmall_continue.json",
    "small": "rtd_small.json",
    "base": "rtd_base.json",
    "large": "rtd_large.json",
}
# The config.json of the published models: layers, width, heads.
HUB = {"xsmall": (12, 384, 6), "small": (6, 768, 12), "base": (12, 768, 12), "large": (24, 1024, 16)}


def read_config(size: str) -> RTDConfig:
    return RTDConfig.from_json(ROOT / "experiments" / "language_model" / CONFIGS[size])


def make_pair(size: str, directory: Path) -> tuple[Path, Path]:
    """Write a pair in the published layout: float16, `weight` and `_weight`, the generator's head in both."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = RTDModel(read_config(size))
    generator = {k: (torch.randn(v.shape) * 0.02).half() for k, v in model.generator.state_dict().items()}
    discriminator = {
        k: (torch.randn(v.shape) * 0.02).half()
        for k, v in model.discriminator.state_dict().items()
        if not k.endswith("_embeddings._weight")
    }
    residual = (torch.randn(generator[f"{WORD}.weight"].shape) * 0.02).half()
    table = (generator[f"{WORD}.weight"].float() + residual.float()).half()
    discriminator |= {f"{WORD}._weight": residual, f"{WORD}.weight": table}
    discriminator |= {k: v for k, v in generator.items() if k.startswith("lm_")}
    paths = directory / "pytorch_model.generator.bin", directory / "pytorch_model.bin"
    for path, state in zip(paths, (generator, discriminator), strict=True):
        torch.save(state, path)
    return paths


@pytest.mark.parametrize("size", ["xsmall", "small"])
def test_the_pair_computes_what_its_files_hold(size, tmp_path):
    generator_path, discriminator_path = make_pair(size, tmp_path)
    config = read_config(size)
    model = RTDModel(config).eval()
    loaded = load_rtd(model, generator_path, discriminator_path)
    assert loaded["generator"].new == loaded["discriminator"].new == loaded["generator"].ignored == ()
    batch = random_batch(2, 96, 128000)
    inputs = (batch.input_ids, batch.input_mask, batch.labels)
    generator = MaskedLanguageModel(config.generator).eval()
    load_masked_lm(generator, generator_path)
    discriminator = ReplacedTokenDetectionModel(config.discriminator).eval()
    state = torch.load(discriminator_path)
    state = {k: v.float() for k, v in state.items() if not k.startswith("lm_") and not k.endswith("._weight")}
    position = "deberta.embeddings.position_embeddings.weight"
    discriminator.load_state_dict(state | {position: discriminator.state_dict()[position]})
    with torch.no_grad():
        assert torch.equal(model.generator(*inputs).loss, generator(*inputs).loss)
        assert torch.equal(model.discriminate(*inputs).logits, discriminator(*inputs).logits)


def read_anonymous_bytes() -> int:
    """Resident memory that is not a cached file, which the kernel may drop."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def measure_loading(*paths: str) -> None:
    """Print the peak of anonymous memory while base is built and loaded, as a multiple of its parameters."""
    gc.collect()
    before, peak, is_done = read_anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not is_done.is_set():
            peak = max(peak, read_anonymous_bytes())
            time.sleep(0.005)

    thread = threading.Thread(target=watch)
    thread.start()
    model = RTDModel(read_config("base"))
    load_rtd(model, *paths)
    is_done.set()
    thread.join()
    needed = sum(parameter.nbytes for parameter in model.parameters())
    assert needed > 1.3e9
    print((peak - before) / needed)


def test_loading_takes_little_more_than_the_model(tmp_path):
    generator, discriminator = make_pair("base", tmp_path)
    for paths in ((generator, discriminator), (FROM_DISCRIMINATOR, discriminator)):
        code = (
            "import sys; from tests.slow.test_published_sizes import measure_loading as m; m(*sys.argv[1:])"
        )
        command = [sys.executable, "-c", code, *map(str, paths)]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        print(result.stdout)
        assert 0.9 < float(result.stdout) <= 1.2
    for path in (generator, discriminator):
        path.unlink()  # large


@pytest.mark.parametrize("size", HUB)
def test_the_shapes_of_the_hub(size):
    """Every tensor of a model built from the published config has its place, and no other is needed."""
    layers, width, heads = HUB[size]
    hub = ModelConfig.from_dict(
        {
            "model_type": "deberta-v2", "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu",
            "hidden_dropout_prob": 0.1, "hidden_size": width, "initializer_range": 0.02,
            "intermediate_size": 4 * width, "max_position_embeddings": 512, "relative_attention": True,
            "position_buckets": 256, "norm_rel_ebd": "layer_norm", "share_att_key": True,
            "pos_att_type": "p2c|c2p", "layer_norm_eps": 1e-7, "max_relative_positions": -1,
            "position_biased_input": False, "num_attention_heads": heads, "num_hidden_layers": layers,
            "type_vocab_size": 0, "vocab_size": 128100,
        }
    )  # fmt: skip
    with torch.device("meta"):
        ours = RTDModel(read_config(size)).discriminator.state_dict()
        theirs = ReplacedTokenDetectionModel(hub).state_dict()
    renamed = {name.replace("_embeddings._weight", "_embeddings.weight"): t.shape for name, t in ours.items()}
    assert renamed == {name: tensor.shape for name, tensor in theirs.items()}

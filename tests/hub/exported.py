"""Model directories of every kind, what this package computes with them, and transformers' view of them."""

import json
import lzma
import os
import subprocess
import sys
import unicodedata
from functools import cache
from pathlib import Path

import torch

from DeBERTa import MaskedLanguageModel, ReplacedTokenDetectionModel, RTDConfig, RTDModel
from DeBERTa.data.batch import MaskedPositions
from DeBERTa.data.tokenizer import Tokenizer
from DeBERTa.hub.export import list_models, write_model
from DeBERTa.hub.inference import detect_replaced, fill_masks, open_model
from tests.conftest import GOLDEN, ROOT

VOCABULARY = GOLDEN / "prepare" / "spm.model"
SCRIPT = Path(__file__).parent / "open_with_transformers.py"
LENGTH = 300  # of the sequences
BASE = {
    "vocab_size": 2008,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "max_position_embeddings": 320,
    "position_biased_input": False,
    "relative_attention": True,
    "pos_att_type": "p2c|c2p",
    "position_buckets": 64,
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "initializer_range": 0.05,
}
VARIANTS: dict[str, dict] = {
    "deberta-v3": {},
    "convolution": {"conv_kernel_size": 3, "conv_act": "gelu"},
    "narrow-embedding": {"embedding_size": 20},
    "c2p": {"pos_att_type": "c2p"},
    "p2c": {"pos_att_type": "p2c"},
    "no-buckets": {"position_buckets": -1},
    "few-distances": {"position_buckets": -1, "max_relative_positions": 40},
    "own-projections": {"share_att_key": False},
    "no-norm": {"norm_rel_ebd": "none"},
    "relu": {"hidden_act": "relu", "conv_kernel_size": 3, "conv_act": "relu"},
    "silu": {"hidden_act": "silu", "conv_kernel_size": 3, "conv_act": "silu"},
    "tanh": {"hidden_act": "tanh", "conv_kernel_size": 3, "conv_act": "tanh"},
    "token-types": {"type_vocab_size": 2},
    "no-terms": {"pos_att_type": "none"},
    "bert": {
        "relative_attention": False,
        "pos_att_type": "none",
        "position_biased_input": True,
        "type_vocab_size": 2,
    },
    "biased-and-relative": {"position_biased_input": True},
    "terms-without-relative": {"relative_attention": False, "position_biased_input": True},
}
PROMPTS = [
    "The state of the Union is [MASK].",
    "[MASK] fellow citizens of the Senate and the [MASK] of Representatives",
    "We [MASK] , and[MASK]s [SEP] peace\u00a0[MASK]",
]


@cache
def read_sentences(number: int) -> list[str]:
    """Return the first sentences of the bundled sample."""
    packed = (ROOT / "experiments" / "sample" / "state_of_the_union.txt.xz").read_bytes()
    text = lzma.decompress(packed).decode()
    sentences = (part.strip() for line in text.split("\n") for part in line.split(". "))
    return [sentence for sentence in sentences if sentence][:number]


def list_compatibility_characters() -> list[str]:
    """Return every character that NFKC changes, and other spaces and format characters."""
    characters = map(chr, range(1, 0x110000))
    return [
        c
        for c in characters
        if unicodedata.category(c) in ("Zs", "Zl", "Zp", "Cf", "Cc")
        or (unicodedata.category(c) != "Cs" and unicodedata.normalize("NFKC", c) != c)
    ]


def list_texts() -> list[str]:
    """Return the texts whose ids are compared: sentences, and compatibility characters in three places."""
    characters = list_compatibility_characters()
    alone = [f"a{c}b" for c in characters]
    together = ["".join(characters[i : i + 40]) for i in range(0, len(characters), 40)]
    ends = [f"{c}word {c} of{c}" for c in characters if unicodedata.category(c)[0] in "ZC"]
    tricky = [
        "",
        " ",
        "  two  spaces ",
        "\ta\n b\r\n",
        "\u2581a \u2581",
        "e\u0301 \u1e9b\u0323",
        "\u4e2d\u6587",
    ]
    return [*read_sentences(20_000), *alone, *together, *ends, *tricky]


def build_model(variant: str) -> RTDModel:
    """Return a GDES model whose weights are all away from their initial values."""
    torch.manual_seed(1)
    discriminator = BASE | VARIANTS[variant]
    generator = discriminator | {"num_hidden_layers": 2}
    model = RTDModel(RTDConfig.from_dict({"generator": generator, "discriminator": discriminator})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def make_batch(has_types: bool) -> dict[str, torch.Tensor]:
    """Return three sequences: full, half padding, one token of padding."""
    torch.manual_seed(2)
    input_ids = torch.randint(4, 2000, (3, LENGTH))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, LENGTH // 2 :] = 0
    attention_mask[2, -1] = 0
    types = (torch.arange(LENGTH) > 100).long().expand(3, -1) if has_types else torch.zeros_like(input_ids)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": types}


@torch.no_grad()
def compute_lm_logits(model: MaskedLanguageModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return logits [N, V] at the real positions, each predicted as if it were masked."""
    is_real = batch["attention_mask"]
    masked = MaskedPositions.from_labels(is_real)
    words = model.deberta.embeddings.word_embeddings(batch["input_ids"])
    hidden = model.lm_predictions.decode(model.deberta, words, batch["input_ids"], is_real, masked)
    return model.lm_predictions.lm_head(hidden, model.get_tables().word)


@torch.no_grad()
def write_variant(variant: str, folder: Path) -> None:
    """Write both models of a variant, and `reference.pt` with the input and our results."""
    model, tokenizer = build_model(variant), Tokenizer(VOCABULARY)
    folder.mkdir(parents=True, exist_ok=True)
    for exported in list_models(model):
        write_model(exported, folder / exported.name, tokenizer, None)
    # The encoder alone takes token types; heads are trained without.
    batch, without = make_batch(bool(model.config.generator.type_vocab_size)), make_batch(has_types=False)
    arguments = (batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])
    encoder = model.generator.deberta(*arguments)
    logits = model.discriminate(without["input_ids"], without["attention_mask"], without["input_ids"]).logits
    reference = {
        "batch": batch,
        "embeddings": encoder.embeddings,
        "hidden_states": list(encoder.hidden_states),
        "lm_logits": compute_lm_logits(model.generator, without),
        "replaced_logits": logits,
    }
    torch.save(reference, folder / "reference.pt")


def write_predictions(folder: Path) -> None:
    """Write `predictions.json`: our masked and replaced tokens for the prompts."""
    model, tokenizer = build_model("deberta-v3"), Tokenizer(VOCABULARY)
    filled = {text: fill_masks(model.generator, tokenizer, text, 5) for text in PROMPTS}
    detector, _ = open_model(folder / "deberta-v3" / "discriminator", ReplacedTokenDetectionModel)
    detected = {text: [p for _, p in detect_replaced(detector, tokenizer, text)] for text in PROMPTS}
    (folder / "predictions.json").write_text(json.dumps({"filled": filled, "detected": detected}))
    (folder / "texts.json").write_text(
        json.dumps({"texts": list_texts(), "ids": tokenizer.encode_lines(list_texts())})
    )


def write_all(folder: Path) -> None:
    """Write everything that `open_with_transformers.py` reads."""
    for variant in VARIANTS:
        write_variant(variant, folder / variant)
    write_predictions(folder)


def open_with_transformers(folder: Path, python: str = sys.executable) -> dict:
    """Return what the transformers of `python` makes of the directories in `folder`."""
    environment = os.environ | {
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": "",
    }
    result = subprocess.run(
        [python, SCRIPT, folder], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)

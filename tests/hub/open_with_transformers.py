"""Open exported directories with transformers, any version, and print how far its results are from ours.

Run as a script on a directory that `exported.py` wrote; imports nothing of this project.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForPreTraining, AutoTokenizer, pipeline

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)


def load(auto_class, directory, **options):
    """Return the model, and the names of weights that the directory lacks."""
    model, info = auto_class.from_pretrained(directory, output_loading_info=True, **options)
    return model.eval(), sorted(info["missing_keys"]) + sorted(info["mismatched_keys"])


def measure_distance(actual, expected):
    """Return the largest absolute difference."""
    return (actual - expected).abs().max().item()


@torch.no_grad()
def compare_variant(folder: Path) -> dict:
    """Return distances of hidden states and logits, and missing weights."""
    reference = torch.load(folder / "reference.pt", weights_only=True)
    batch = reference["batch"]
    real = batch["attention_mask"] > 0
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    encoder, missing = load(AutoModel, folder / "generator")
    states = encoder(**batch, output_hidden_states=True).hidden_states
    expected = [reference["embeddings"], *reference["hidden_states"]]
    hidden = max(measure_distance(a[real], b[real]) for a, b in zip(states, expected, strict=True))
    lm, missing_lm = load(AutoModelForMaskedLM, folder / "generator", trust_remote_code=True)
    detector, missing_detector = load(
        AutoModelForPreTraining, folder / "discriminator", trust_remote_code=True
    )
    encoder, missing_encoder = load(AutoModel, folder / "discriminator")
    labels = torch.where(real, 0, -100)
    return {
        "encoder": type(encoder).__name__,
        "hidden": hidden,
        "lm": measure_distance(lm(**inputs).logits[real], reference["lm_logits"]),
        "lm_loss": lm(**inputs, labels=labels).loss.item(),
        "replaced": measure_distance(detector(**inputs).logits[real], reference["replaced_logits"][real]),
        "replaced_loss": detector(**inputs, labels=labels).loss.item(),
        "missing": missing + missing_lm + missing_detector + missing_encoder,
    }


def compare_tokenizers(folder: Path, directory: Path) -> dict:
    """Return the texts whose ids differ, and properties of the tokenizer."""
    content = json.loads((folder / "texts.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer(content["texts"], add_special_tokens=False, verbose=False)["input_ids"]
    pair = tokenizer("a", "b")
    return {
        "texts": len(ids),
        "differing": [t for t, a, b in zip(content["texts"], ids, content["ids"], strict=True) if a != b],
        "special": [getattr(tokenizer, f"{name}_token_id") for name in ("pad", "cls", "sep", "unk", "mask")],
        "length": tokenizer.model_max_length,
        "pair": [pair["input_ids"], pair["token_type_ids"], pair["attention_mask"]],
        "decoded": tokenizer.decode(tokenizer("The Union is [MASK], strong.")["input_ids"]),
    }


@torch.no_grad()
def compare_predictions(folder: Path, variant: Path) -> dict:
    """Return the largest distances of probabilities, and whether a pipeline names the same tokens."""
    filled, detected = json.loads((folder / "predictions.json").read_text()).values()
    fill = pipeline("fill-mask", str(variant / "generator"), trust_remote_code=True)
    distances, tokens = [], True
    for text, expected in filled.items():
        actual = fill(text, top_k=5)
        actual = actual if isinstance(actual[0], list) else [actual]
        for ours, theirs in zip(expected, actual, strict=True):
            distances += [abs(p - answer["score"]) for (_, p), answer in zip(ours, theirs, strict=True)]
            named = fill.tokenizer.convert_ids_to_tokens([answer["token"] for answer in theirs])
            tokens &= [piece for piece, _ in ours] == named
    tokenizer = AutoTokenizer.from_pretrained(variant / "discriminator")
    detector, _ = load(AutoModelForPreTraining, variant / "discriminator", trust_remote_code=True)
    for text, expected in detected.items():
        probabilities = detector(**tokenizer(text, return_tensors="pt")).logits[0, 1:-1].sigmoid()
        distances.append(measure_distance(probabilities, torch.tensor(expected)))
    return {"distance": max(distances), "same_tokens": tokens, "class": type(fill.model).__name__}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    variants = sorted(path.parent.name for path in folder.glob("*/reference.pt"))
    results = {name: compare_variant(folder / name) for name in variants}
    print(
        json.dumps(
            {
                "version": transformers.__version__,
                "variants": results,
                "tokenizer": compare_tokenizers(folder, folder / variants[0] / "generator"),
                "predictions": compare_predictions(folder, folder / "deberta-v3"),
            }
        )
    )

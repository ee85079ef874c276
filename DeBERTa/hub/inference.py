"""Predictions of an exported model for a text, without transformers.

They are masked tokens, or replaced tokens.
"""

import re
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import nn

from DeBERTa.config import ModelConfig, read_json
from DeBERTa.data.tokenizer import MASK_PIECE, SPECIAL_PIECES, WORD_MARK, Tokenizer
from DeBERTa.errors import ConfigError
from DeBERTa.hub.published import select_weights
from DeBERTa.hub.tokenizer_json import build_tokenizer_json
from DeBERTa.hub.weights import StateDict, check_finite, read_weights
from DeBERTa.log import escape_control
from DeBERTa.model.pretraining import MaskedLanguageModel, ReplacedTokenDetectionModel

Model = TypeVar("Model", bound=nn.Module)
# A weight of the head of each kind of model, and the command for models without it.
HEADS: dict[type[nn.Module], tuple[str, str]] = {
    MaskedLanguageModel: ("lm_predictions.lm_head.bias", "python -m DeBERTa.detect"),
    ReplacedTokenDetectionModel: ("mask_predictions.classifier.bias", "python -m DeBERTa.fill_mask"),
}
SPECIAL = re.compile(f"({'|'.join(map(re.escape, (*SPECIAL_PIECES, MASK_PIECE)))})")


class TokenProbability(NamedTuple):
    """A piece of the vocabulary and its probability."""

    piece: str
    probability: float

    @property
    def text(self) -> str:
        """Return the piece as text to print.

        It has a space in place of the word mark, and its control characters are escaped.
        """
        return escape_control(self.piece.replace(WORD_MARK, " "))


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of `text` between `[CLS]` and `[SEP]`.

    It may have special pieces such as `[MASK]`. The ids are those of the exported `tokenizer.json`: text
    after a special piece starts a word only if it starts with a space.
    """
    first, *others = SPECIAL.split(text)  # text and special pieces in turn
    ids = [tokenizer.cls_id, *tokenizer.encode_lines([first])[0]]
    for piece, segment in zip(others[::2], others[1::2], strict=True):
        is_word_start = tokenizer.normalize(f"a{segment}").startswith("a ")
        ids.append(tokenizer.piece_to_id[piece])
        ids += tokenizer.encode_lines([segment])[0] if is_word_start else tokenizer.encode_inside(segment)
    return [*ids, tokenizer.sep_id]


def open_model(directory: Path, model_class: type[Model]) -> tuple[Model, Tokenizer]:
    """Open an exported model.

    Raises `ConfigError` if `directory` is not that of a model, or is that of a model with another head.
    """
    path = directory / "model.safetensors"
    is_checkpoint = (directory / "optimizer.pt").exists()
    if is_checkpoint or not path.exists():
        reason = "it is that of a checkpoint" if is_checkpoint else "it has no model.safetensors"
        models = ", ".join(str(path.parent) for path in sorted(directory.glob("*/model.safetensors")))
        hint = f"give one of {models}" if models else "python -m DeBERTa.export writes one from a run"
        raise ConfigError(f"{directory} is not the directory of a model: {reason}; {hint}")
    tokenizer = Tokenizer(directory / "spm.model")
    check_same_vocabulary(tokenizer, directory / "tokenizer.json")
    config, weights = ModelConfig.from_json(directory / "config.json"), read_weights(path)
    head, other = HEADS[model_class]
    if head not in weights:
        raise ConfigError(f"{directory}: the model has another head ({head} is missing); try {other}")
    return build_from_weights(model_class, config, weights, path), tokenizer


def build_from_weights(
    model_class: type[Model], config: ModelConfig, weights: StateDict, path: Path
) -> Model:
    """Return the model of weights from `path`, in float32, for predictions.

    Raises `ConfigError` if they do not fit the config, or are not finite.
    """
    with torch.device("meta"):  # wrong sizes are found without memory for them
        model = model_class(config)
    model.load_state_dict(select_weights(model, weights, path), assign=True)
    for name, tensor in weights.items():
        check_finite(tensor, name, path)
    return model.float().eval()


def check_same_vocabulary(tokenizer: Tokenizer, path: Path) -> None:
    """Raise `ConfigError` if `tokenizer.json` has other pieces or normalization.

    A directory without that file is accepted.
    """
    if path.exists():
        own, other = build_tokenizer_json(tokenizer), read_json(path)
        map_name = "precompiled_charsmap"
        characters = own["normalizer"]["normalizers"][0].get(map_name)
        try:
            expected, size = own["model"]["vocab"], len(own["model"]["vocab"])
            pieces = [tuple(piece) for piece in other["model"]["vocab"]]
            normalizers = (other.get("normalizer") or {}).get("normalizers", [])
            added = [name for name, *_ in pieces[size:]]  # transformers may have appended [MASK]
            is_same = pieces[:size] == expected and added in ([], [MASK_PIECE])
            is_same &= all(each.get(map_name, characters) == characters for each in normalizers)
        except (AttributeError, KeyError, TypeError, ValueError):  # lists in place of objects, for example
            is_same = False
        if not is_same:
            raise ConfigError(
                f"{tokenizer.path} and {path.name} are not of the same vocabulary: one of them was replaced "
                "or damaged; export the model again"
            )


@torch.no_grad()
def fill_masks(
    model: MaskedLanguageModel, tokenizer: Tokenizer, text: str, top_k: int
) -> list[list[TokenProbability]]:
    """Return the `top_k` most probable pieces for every `[MASK]` in `text`.

    Raises `ConfigError` for a text without one, or one that is too long.
    """
    input_ids = _encode_batch(tokenizer, text, model.config)
    is_mask = input_ids == tokenizer.mask_id
    if not is_mask.any():
        raise ConfigError(f"no {MASK_PIECE} in the text: nothing to fill; put it in place of a word")
    # The labels say only which positions to predict.
    logits = model(input_ids, torch.ones_like(input_ids), input_ids * is_mask).logits
    pieces = tokenizer.pieces
    # The word table may have more rows than there are pieces.
    top = logits.softmax(-1)[:, : len(pieces)].topk(min(top_k, len(pieces)))
    return [
        [TokenProbability(pieces[i], p) for p, i in zip(*row, strict=True)]
        for row in zip(top.values.tolist(), top.indices.tolist(), strict=True)
    ]


@torch.no_grad()
def detect_replaced(
    model: ReplacedTokenDetectionModel, tokenizer: Tokenizer, text: str
) -> list[TokenProbability]:
    """Return every piece of `text` with the probability that it was replaced.

    `[CLS]` and `[SEP]` at the ends are omitted. Raises `ConfigError` for a text without pieces, or one that
    is too long.
    """
    input_ids = _encode_batch(tokenizer, text, model.config)
    if input_ids.size(1) == 2:
        raise ConfigError("the text is blank: nothing to look at; give a sentence")
    logits = model.compute_logits(input_ids, torch.ones_like(input_ids), None)
    probabilities = logits[0].sigmoid().tolist()
    pieces = [tokenizer.pieces[i] for i in input_ids[0].tolist()]
    return [TokenProbability(*pair) for pair in zip(pieces, probabilities, strict=True)][1:-1]


def _encode_batch(tokenizer: Tokenizer, text: str, config: ModelConfig) -> torch.Tensor:
    """Return the ids int64 [1, L]."""
    if any("\ud800" <= character <= "\udfff" for character in text):  # a byte of an argument
        raise ConfigError("the text is not valid UTF-8: some bytes are no characters; give it in UTF-8")
    ids = encode_prompt(tokenizer, text)
    if len(ids) > config.max_position_embeddings:
        raise ConfigError(
            f"the text has {len(ids)} tokens: the model takes {config.max_position_embeddings}; shorten it"
        )
    return torch.tensor([ids])

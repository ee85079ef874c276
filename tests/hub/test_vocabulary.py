"""Another vocabulary: rows of shared pieces are bitwise the old ones, others the mean of their old pieces."""

import pytest
import torch

from DeBERTa import MaskedLanguageModel, ModelConfig, RTDConfig, RTDModel
from DeBERTa.data.corpus import extract_sample
from DeBERTa.data.tokenizer import Tokenizer, train_vocabulary
from DeBERTa.errors import ConfigError
from DeBERTa.hub.published import LoadOptions, load_masked_lm, load_rtd
from DeBERTa.hub.vocabulary import VocabularyMap, split_piece
from tests.conftest import TINY, tiny_rtd
from tests.hub.test_published import disturb

WORD = "deberta.embeddings.word_embeddings.weight"
BIAS = "lm_predictions.lm_head.bias"


@pytest.fixture(scope="module")
def new(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("vocabulary") / "spm.model"
    with extract_sample()["valid"].open(encoding="utf-8") as lines:
        path.write_bytes(train_vocabulary(lines, 900))
    return Tokenizer(path)


def test_rows(tokenizer, new):
    """Every row is that of its piece, or the mean of rows whose pieces spell it."""
    table = torch.randn(2008, 6, generator=torch.Generator().manual_seed(1))
    bias = torch.randn(2008, generator=torch.Generator().manual_seed(2))
    resize = VocabularyMap(tokenizer, new, 912)
    state = resize.convert({WORD: table, BIAS: bias, "other": bias}, "x.bin")
    assert state[WORD].shape == (912, 6)
    assert state[BIAS].shape == (912,)
    assert state["other"] is bias
    shared = 0
    for row, piece in enumerate(new.pieces):
        if piece in tokenizer.piece_to_id:
            old = tokenizer.piece_to_id[piece]
            assert torch.equal(state[WORD][row], table[old])
            assert state[BIAS][row] == bias[old]
            shared += 1
        else:
            ids = split_piece(piece, tokenizer)
            spelled = "".join(tokenizer.pieces[i] for i in ids)
            assert spelled == piece or tokenizer.unk_id in ids
            torch.testing.assert_close(state[WORD][row], table[ids].mean(0))
    assert shared == resize.num_shared
    assert 100 < shared < len(new)
    assert [state[WORD][i].equal(table[i]) for i in range(4)] == [True] * 4
    assert torch.equal(state[WORD][new.mask_id], table[tokenizer.mask_id])
    assert not state[WORD][len(new) :].any()
    assert (state[BIAS][len(new) :] == bias.min()).all()


def test_models(tokenizer, new, tmp_path):
    """Tables, residual and head bias; under GDES the sum of the discriminator is the mean of sums."""
    torch.manual_seed(6)
    old = disturb(RTDModel(RTDConfig.from_dict(tiny_rtd())))
    torch.save(old.state_dict(), tmp_path / "model.bin")
    config = tiny_rtd()
    for part in ("generator", "discriminator"):
        config[part] = config[part] | {"vocab_size": 912}
    model = RTDModel(RTDConfig.from_dict(config))
    resize = VocabularyMap(tokenizer, new, 912)
    paths = (tmp_path / "model.bin", tmp_path / "model.bin")
    with pytest.raises(ConfigError, match=r"--resize_vocab is for .* config\.json as --model_config"):
        load_rtd(model, *paths)
    load_rtd(model, *paths, LoadOptions(resize=resize.convert))
    wanted = resize.convert({WORD: old.merge_discriminator()[WORD]}, "x")[WORD]
    torch.testing.assert_close(model.merge_discriminator()[WORD], wanted)
    torch.save(old.generator.state_dict(), tmp_path / "g.bin")
    single = MaskedLanguageModel(ModelConfig.from_dict(TINY | {"vocab_size": 912, "num_hidden_layers": 1}))
    load_masked_lm(single, tmp_path / "g.bin", LoadOptions(resize=resize.convert))
    assert torch.equal(single.state_dict()[WORD], model.generator.state_dict()[WORD])


def test_the_vocabulary_of_other_weights(tokenizer, new):
    with pytest.raises(ConfigError, match=r"x\.bin does not fit the vocabulary .* which has 2001 tokens"):
        VocabularyMap(tokenizer, new, 912).convert({WORD: torch.zeros(1900, 4)}, "x.bin")

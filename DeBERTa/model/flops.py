"""FLOPs of a training step by formula.

Matmuls only, 2 per multiply-add; the backward pass takes twice the forward pass. What is computed again to
save memory does not count. Position terms count the rows of the relative-position table that a sequence can
use: one per distance, of which there are 2 * length - 1, or all of the table.
"""

from DeBERTa.config import ModelConfig, RTDConfig

MASKED = 0.15  # share of the tokens
DECODER_PASSES = 2  # of the last layer in the enhanced mask decoder


def count_flops_per_token(config: ModelConfig | RTDConfig, length: int) -> float:
    """Return FLOPs per token, forward and backward, in sequences of `length` tokens."""
    if isinstance(config, ModelConfig):
        return 3 * _count_masked_lm(config, length)
    discriminator = config.discriminator
    forward = _count_encoder(discriminator, length, discriminator.num_hidden_layers)
    return 3 * (_count_masked_lm(config.generator, length) + forward + 2 * discriminator.hidden_size**2)


def _count_layer(config: ModelConfig, length: int) -> tuple[float, float]:
    """Return the forward FLOPs per token of one layer.

    They are those of its queries, and those of keys, values and p2c.
    """
    heads = config.num_attention_heads * config.head_size
    rows = min(2 * length - 1, 2 * config.position_span)
    terms = dict.fromkeys(config.position_terms, 2 * rows * heads)
    queries = 4 * config.hidden_size * (heads + config.intermediate_size) + 4 * length * heads
    return queries + terms.get("c2p", 0), 4 * config.hidden_size * heads + terms.get("p2c", 0)


def _count_encoder(config: ModelConfig, length: int, layers: int) -> float:
    """Return FLOPs per token of embeddings, convolution and the first layers, forward."""
    width = config.hidden_size
    projected = 2 * width * config.embedding_width if config.embedding_width != width else 0
    return projected + 2 * config.conv_kernel_size * width**2 + layers * sum(_count_layer(config, length))


def _count_masked_lm(config: ModelConfig, length: int) -> float:
    """Return FLOPs per token of a model with LM head, forward.

    The last layer is applied to queries at the masked positions alone.
    """
    queries, keys = _count_layer(config, length)
    passes = 1 if config.position_biased_input else DECODER_PASSES
    head = 2 * config.embedding_width * (config.hidden_size + config.vocab_size)
    encoder = _count_encoder(config, length, config.num_hidden_layers - 1)
    return encoder + keys + MASKED * (passes * queries + head)

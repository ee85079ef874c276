"""FLOPs of one RTD training step by formula.

Matmuls only, 2 per multiply-add; the backward pass takes twice the forward pass. What is computed again to
save memory does not count. Position terms count the rows of the relative-position table that a sequence can
use, of which there are `length` or fewer.
"""

MASKED = 0.15  # share of the tokens
DECODER_PASSES = 2  # of the enhanced mask decoder, over the masked positions


def _count_layer(model: dict, length: int) -> dict[str, float]:
    """Return FLOPs per token of one layer, forward."""
    width, inner = model["hidden_size"], model["intermediate_size"]
    rows = min(length, 2 * model["position_buckets"])
    return {
        "linear": 8 * width * width + 4 * width * inner,
        "content": 4 * length * width,
        "position": 4 * rows * width,
    }


def count_flops_per_token(config: dict, length: int) -> float:
    """Return FLOPs per token of an RTD config, forward and backward of generator and discriminator."""
    generator, discriminator = config["generator"], config["discriminator"]
    width, inner = generator["hidden_size"], generator["intermediate_size"]
    rows = min(length, 2 * generator["position_buckets"])
    forward = discriminator["num_hidden_layers"] * sum(_count_layer(discriminator, length).values())
    forward += (generator["num_hidden_layers"] - 1) * sum(_count_layer(generator, length).values())
    # The generator's last layer: keys, values and p2c everywhere; queries, output and feed-forward where
    # masked.
    forward += 4 * width * width + 2 * rows * width
    each = 4 * width * width + 4 * width * inner + 4 * length * width + 2 * rows * width
    forward += MASKED * DECODER_PASSES * each
    forward += MASKED * (2 * width * width + 2 * width * generator["vocab_size"])
    forward += 2 * discriminator["hidden_size"] ** 2
    return 3 * forward

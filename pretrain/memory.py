"""What a run needs of a GPU's memory: the state by ZeRO stage, which is arithmetic, and activations, an estimate.

Free of torch.
"""

from pretrain.config import Config

_MOMENTS = {"adamw": 8, "adamw8bit": 2, "muon": 4}
"""Bytes a parameter; Muon's of the matrices, which are nearly all, in fp32."""
_LAYER_BYTES = 34
"""Of activations a layer keeps for the backward pass, for each token and channel in 16 bits, without the attention
weights: 11 attention, 19 feed forward, 4 norms (Korthikanti et al. 2022, arXiv:2205.05198, equation 1)."""
_CROSS_BYTES = 13
"""Of these, attention once more with its norm: a decoder layer's cross attention."""


def state_bytes(config: Config, parameters: int, world_size: int) -> float:
    """Bytes of weights, gradients and optimizer state that each GPU holds, at least.

    For each parameter (ZeRO, Rajbhandari et al. 2020, arXiv:1910.02054, sections 3 and 5; over N ranks):

        weights      p = 2 in bf16 and fp16, 4 in fp32                         divided by N at stage 3
        gradients    g = 4, the sum over micro-batches; in fp16 2              by N at stages 2 and 3
        optimizer    o = 4 master weights (none apart at stage 0) + moments    by N at stages 1 to 3
                         (AdamW 8, in 8 bits 2, Muon 4)

    With `engine.offload=cpu` gradients and optimizer state are the host's. Buffers for communication come on top.
    """
    engine = config.engine
    weights = 4 if engine.precision == "fp32" else 2
    gradients = 2 if engine.precision == "fp16" else 4
    optimizer = _MOMENTS[config.optimizer.kind] + (4 if engine.zero_stage else 0)
    if engine.offload == "cpu":
        gradients = optimizer = 0
    divided = [1 if engine.zero_stage < stage else world_size for stage in (3, 2, 1)]
    size = weights / divided[0] + gradients / divided[1] + optimizer / divided[2]
    if engine.hpz_partition_size > 1:
        size += weights / engine.hpz_partition_size
    return parameters * size


def activation_bytes(config: Config, micro_batch: int) -> float:
    """An estimate of what a micro-batch keeps for the backward pass; the head's logits and masks are not in it."""
    model = config.model
    inputs, targets = model.lengths
    factor = 2 if config.engine.precision == "fp32" else 1
    width = model.width * factor
    if not model.num_decoder_layers:
        layers = [(model.layers, inputs, inputs, _LAYER_BYTES)]
    else:
        layers = [
            (model.num_encoder_layers, inputs, inputs, _LAYER_BYTES),
            (model.num_decoder_layers, targets, inputs + targets, _LAYER_BYTES + _CROSS_BYTES),
        ]
    total = 0.0
    for count, tokens, seen, size in layers:
        layer = size * tokens * width
        if model.needs_weights:  # 5 a s² b of the same equation
            layer += 5 * factor * model.heads * tokens * seen
        if config.engine.activation_checkpointing:  # the input of each layer, and one layer as a whole
            total += count * 2 * tokens * width + layer
        else:
            total += count * layer
    return micro_batch * total

"""Small models and batches."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from model.architectures import registry
from model.architectures.registry import configure
from model.architectures.token_model import TokenModel
from model.batch import Batch
from model.config.mask_config import LearnedDropoutConfig
from model.config.model_config import ModelConfig

torch.set_num_threads(1)

VOCABULARY = 17
ARCHITECTURES = ("parallel_encoder_decoder", "decoder_only")

_OFF = {"learned_dropout": {"enabled": False}}
_MODERN = {"norm": "rmsnorm", "positions": "rotary", "ff": "swiglu", "heads": 4, "kv_heads": 2}
_EVERYWHERE = ["enc_ff", "dec_ff", "enc_sa", "dec_sa", "cross", "embed"]
_ALONE = {"architecture": "decoder_only"}
_ALONE_EVERYWHERE = ["dec_ff", "dec_sa", "embed"]
_CAUSAL: dict[str, dict[str, Any]] = {
    "parallel": {},
    "decoder": _ALONE,
    "serial": {"topology": "serial"},
    "layer_input": {"cross_source": "layer_input", "layers": 3, "decoder_residual_writes": 3},
    "cross_first": {"decoder_order": "cross_self_ff", "attention": "flash"},
    "next_position": {"add_next_position": True, "subtract_next_position": "plain", "decoder_input_norm": True},
    "next_position_norm": {"topology": "serial", "subtract_next_position": "layer_norm", **_OFF},
    "encoder_loss": {"encoder_loss": {"kind": "mse"}, "learned_dropout": {"source": "low_rank"}},
    "encoder_loss_published": {
        "encoder_loss": {"kind": "cosine", "embedding_norm": "embedding", "affine": True, "detach": "none"},
    },
    "encoder_loss_serial": {
        "topology": "serial",
        "encoder_loss": {"kind": "log_cosine", "affine": True, "detach": "embedding"},
        **_OFF,
    },
    "smoothed": {"label_smoothing": 0.1, "z_loss": 0.01},
    "dropout": {"dropout": 0.2, "bias": True},
    "dropout_decoder": {**_ALONE, **_OFF, "dropout": 0.2, "norm_position": "post", "attention": "explicit"},
    "dropout_modern": {**_MODERN, **_OFF, "dropout": 0.1, "attention_dropout": 0.3},
    "everywhere": {"learned_dropout": {"sites": _EVERYWHERE, "rounding": "threshold_ste"}},
    "everywhere_embed": {"learned_dropout": {"sites": _EVERYWHERE, "source": "embed", "detach_embed": True}},
    "everywhere_elementwise": {
        "learned_dropout": {"sites": _EVERYWHERE, "source": "elementwise", "eval_rounding": "sample"}
    },
    "everywhere_decoder": {
        **_ALONE,
        "learned_dropout": {"sites": _ALONE_EVERYWHERE, "source": "embed", "eval_rounding": "sample"},
    },
    "sigmoid": {"topology": "serial", "learned_dropout": {"rounding": "sigmoid", "eval_rounding": "none"}},
    "sigmoid_ste": {**_ALONE, "learned_dropout": {"rounding": "sigmoid_ste", "source": "elementwise"}},
    "unrounded": {"learned_dropout": {"rounding": "none", "eval_rounding": "none"}},
    "l0": {**_OFF, "l0": {"enabled": True, "sites": _EVERYWHERE}},
    "l0_decoder": {**_ALONE, **_OFF, "l0": {"enabled": True}},
    "modern": _MODERN,
    "shrunk": {
        **_MODERN,
        "heads_left": {"dec_sa/01": 2, "cross/00": 6, "enc_sa/00": 2},
        "channels_left": {"dec_ff/00": 5},
    },
    "modern_serial": {**_MODERN, "topology": "serial", "norm_position": "post"},
    "modern_decoder": {**_ALONE, **_MODERN, "kv_heads": 1, "attention": "explicit"},
    "post_norm": {"norm_position": "post", "positions": "sinusoidal", "cross_source": "layer_input"},
    "sinusoidal": {**_ALONE, "positions": "sinusoidal", "width": 18, "heads": 3},
    "gates": {**_OFF, "bias": True, "block_gates": {"kind": "top", "blocks": 4, "density": 0.5}},
    "gates_cosine": {
        "learned_dropout": {"sites": ["dec_sa", "enc_ff"]},
        "block_gates": {"kind": "cosine", "sites": ["dec_ff"], "blocks": 4},
        "norm_position": "post",
        "dropout": 0.1,
    },
    "gates_modern": {**_ALONE, **_OFF, **_MODERN, "block_gates": {"kind": "cosine", "left": {"dec_ff/01": 5}}},
    "universal": {"recurrence": {"steps": 3}, "learned_dropout": {"sites": ["dec_sa", "enc_ff"], "source": "low_rank"}},
    "universal_decoder": {**_ALONE, **_OFF, "recurrence": {"steps": 2, "step_embedding": "sinusoidal"}},
    "halting": {**_OFF, "recurrence": {"steps": 3, "halt": True, "halt_bias": 0}, "norm_position": "post"},
    "halting_decoder": {**_ALONE, **_OFF, **_MODERN, "recurrence": {"steps": 4, "halt": True, "halt_bias": 0}},
    "two_stream": {
        "architecture": "two_stream",
        "learned_dropout": {"sites": _ALONE_EVERYWHERE, "eval_rounding": "sample"},
        "permutation": {"share": 0.3},
        "bias": True,
    },
    "two_stream_modern": {
        "architecture": "two_stream",
        **_MODERN,
        **_OFF,
        "norm_position": "post",
        "permutation": {"share": 1.0},
        "block_gates": {"kind": "cosine", "blocks": 4},
    },
    "two_stream_embed": {
        "architecture": "two_stream",
        "learned_dropout": {"sites": ["dec_ff"], "source": "embed"},
        "positions": "sinusoidal",
        "attention": "explicit",
        "dropout": 0.1,
    },
    "sinusoidal_next": {"positions": "sinusoidal", "add_next_position": True, "subtract_next_position": "plain"},
}
"""Every option at least once, in the combinations that could break one another."""

_T5 = {"architecture": "encoder_decoder"}
_DRAFT = {"architecture": "draft_and_verify", "cross_heads": 2}
_BERT = {"architecture": "encoder_only"}
_BERT_EVERYWHERE = ["enc_ff", "enc_sa", "embed"]
_BOTH_WAYS: dict[str, dict[str, Any]] = {
    "t5": {**_T5, "norm": "rmsnorm", "cross_heads": 2, "bias": True},
    "t5_modern": {**_T5, **_MODERN, "norm_position": "post", "learned_dropout": {"sites": _EVERYWHERE}},
    "t5_embed": {
        **_T5,
        "decoder_order": "cross_self_ff",
        "decoder_residual_writes": 3,
        "learned_dropout": {"sites": _EVERYWHERE, "source": "embed", "eval_rounding": "sample"},
    },
    "t5_dropout": {**_T5, **_OFF, "positions": "sinusoidal", "dropout": 0.2},
    "t5_batchnorm": {**_T5, **_OFF, "norm": "batchnorm", "bias": True},
    "t5_gates": {**_T5, **_MODERN, **_OFF, "block_gates": {"kind": "cosine", "blocks": 4}},
    "t5_l0": {**_T5, **_OFF, "attention": "flash", "l0": {"enabled": True, "sites": _EVERYWHERE}},
    "draft": {**_DRAFT, **_OFF, "bias": True, "dropout": 0.1},
    "draft_modern": {
        **_DRAFT,
        **_MODERN,
        "norm_position": "post",
        "learned_dropout": {"sites": [*_EVERYWHERE, "draft_ff", "draft_sa", "draft_cross"]},
        "draft": {"layers": 2, "masking": "glat"},
    },
    "draft_shared": {**_DRAFT, "draft": {"share": True, "masking": "cmlm"}, "learned_dropout": {"source": "embed"}},
    "draft_refine": {**_DRAFT, **_OFF, "draft": {"refine": True, "masking": "nat"}},
    "bert": {**_BERT, "norm_position": "post", "bias": True},
    "bert_batchnorm": {**_BERT, "norm": "batchnorm"},
    "bert_batchnorm_post": {**_BERT, **_OFF, "norm": "batchnorm", "norm_position": "post", "dropout": 0.2},
    "bert_modern": {**_BERT, **_MODERN, "attention": "flash", "learned_dropout": {"sites": _BERT_EVERYWHERE}},
    "bert_embed": {**_BERT, "attention": "explicit", "learned_dropout": {"sites": _BERT_EVERYWHERE, "source": "embed"}},
    "bert_gates": {**_BERT, **_OFF, "block_gates": {"kind": "top", "blocks": 2, "density": 0.5, "left": {}}},
    "bert_halting": {**_BERT, **_OFF, "recurrence": {"steps": 3, "halt": True, "step_embedding": "none"}},
    "bert_dropout": {**_BERT, **_OFF, "positions": "sinusoidal", "dropout": 0.2},
    "bert_elementwise": {
        **_BERT,
        "learned_dropout": {"sites": _BERT_EVERYWHERE, "source": "elementwise", "eval_rounding": "sample"},
    },
}
"""The same of the models that do not predict each token from those before it."""
NAMED = _CAUSAL | _BOTH_WAYS


def options(changes: dict[str, Any], place: str = "") -> dict[str, Any]:
    """A variant's changes by their dotted keys."""
    found: dict[str, Any] = {}
    for name, value in changes.items():
        found |= options(value, f"{place}{name}.") if isinstance(value, dict) and value else {place + name: value}
    return found


def _nested(options: dict[str, Any]) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for key, value in options.items():
        *way, name = key.split(".")
        part = changes
        for step in way:
            part = part.setdefault(step, {})
        part[name] = value
    return changes


def _class(options: dict[str, Any]) -> tuple[object, ...]:
    """What keeps variants apart: a suite treats them otherwise, or the one would hide the other."""
    rounding = options.get("learned_dropout.rounding")
    masks = options.get("learned_dropout.enabled", True), rounding if rounding != "threshold_ste" else None
    parts = {key.split(".")[0] for key in options} & {"encoder_loss", "l0", "block_gates"}
    halts = options.get("recurrence.halt")
    return options.get("architecture"), options.get("norm") == "batchnorm", masks, parts, halts


def _together(variants: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Variants joined where their options do not contradict one another; the plain ones stay plain."""
    found: dict[str, dict[str, Any]] = {}
    for name, changes in variants.items():
        mine = options(changes)
        for other, theirs in found.items():
            agree = all(theirs.get(key, value) == value for key, value in mine.items())
            if mine and theirs and agree and _class(mine) == _class(theirs) and _possible(mine | theirs):
                del found[other]
                name, mine = f"{other}+{name}", theirs | mine
                break
        found[name] = mine
    return {name: _nested(mine) for name, mine in found.items()}


def _possible(options: dict[str, Any]) -> bool:
    try:
        small(**_nested(options))
    except ValueError:
        return False
    return True


def _patterned(of: str, **pattern: Any) -> dict[str, Any]:
    return NAMED[of] | {"pattern": pattern}


PATTERNED = {
    "window": _patterned("parallel", kind="window", window=3),
    "sinks": _patterned("modern_decoder", kind="window", window=2, sinks=2, full_every=2),
    "sinks_alone": _patterned("cross_first", kind="window", window=3, sinks=1),
    "globals": _patterned("dropout_decoder", kind="window", window=2, globals=[0, 4]),
    "strided": _patterned("serial", kind="strided", stride=3),
    "strided_alternate": _patterned("everywhere_elementwise", kind="strided", stride=3, merge="alternate"),
    "strided_heads": _patterned("everywhere_embed", kind="strided", stride=4, merge="heads"),
    "fixed": _patterned("modern", kind="fixed", stride=4, summary=2),
    "fixed_alternate": _patterned("post_norm", kind="fixed", stride=3, merge="alternate"),
    "fixed_heads": _patterned("dropout_modern", kind="fixed", merge="heads"),
}
"""Each pattern with another model, so that options meet in pairs."""
PATTERNED_BOTH_WAYS = {
    "bert_window": _patterned("bert_modern", kind="window", window=3),
    "bert_sinks": _patterned("bert_embed", kind="window", window=2, sinks=7),
    "bert_globals": _patterned("bert", kind="window", window=2, globals=[0, 4]),
    "bert_strided": _patterned("bert_dropout", kind="strided", stride=3),
    "t5_strided": _patterned("t5_modern", kind="strided", stride=3, merge="alternate"),
    "t5_fixed": _patterned("t5_embed", kind="fixed", merge="heads"),
}


MIXED = {
    "entmax": NAMED["gates_cosine"] | {"weights": {"kind": "entmax"}},
    "entmax_fixed": PATTERNED["sinks"] | {"weights": {"kind": "entmax", "alpha": 1.5}},
    "span": NAMED["dropout_modern"] | {"weights": {"kind": "adaptive_span", "ramp": 3, "span_init": 0.3}},
    "span_sinks": PATTERNED["sinks_alone"]
    | {"attention": "auto", "weights": {"kind": "adaptive_span", "ramp": 2, "max_span": 4, "span_init": 0.4}},
    "dense": NAMED["everywhere_embed"] | {"scores": {"kind": "synthesizer"}},
    "random": NAMED["gates"] | {"scores": {"kind": "synthesizer", "parts": ["random"]}},
    "factorised": {
        **PATTERNED["globals"],
        "scores": {"kind": "synthesizer", "parts": ["factorised_dense", "factorised_random"], "rank": 3},
    },
    "mixture": PATTERNED["window"]
    | {"scores": {"kind": "synthesizer", "parts": ["dot", "dense", "random"], "trainable": False}},
    "routing": NAMED["gates_cosine"] | {"scores": {"kind": "routing", "clusters": 3, "window": 2}},
    "routing_near": {
        **_ALONE,
        **_OFF,
        "scores": {"kind": "routing", "clusters": 2, "routed_heads": 2, "cluster_window": 2},
    },
    "routing_window": {
        **PATTERNED["sinks_alone"],
        "attention": "auto",
        "scores": {"kind": "routing", "clusters": 2, "routed_heads": 2},
    },
}
"""Other weights and other scores."""
MIXED_BOTH_WAYS = {
    "t5_entmax": PATTERNED_BOTH_WAYS["t5_strided"] | {"weights": {"kind": "entmax"}},
    "t5_span": NAMED["t5_dropout"] | {"weights": {"kind": "adaptive_span", "ramp": 4, "max_span": 3, "span_init": 0.5}},
    "t5_linformer": NAMED["t5_modern"] | {"scores": {"kind": "linformer", "slots": 5}},
    "bert_linformer": NAMED["bert_embed"]
    | {"attention": "auto", "scores": {"kind": "linformer", "slots": 4, "sharing": "layerwise"}},
    "bert_linformer_alone": NAMED["bert_dropout"] | {"scores": {"kind": "linformer", "slots": 5, "sharing": "none"}},
    "bert_random": NAMED["bert_dropout"]
    | {"positions": "learned", "scores": {"kind": "synthesizer", "parts": ["dot", "factorised_random"]}},
    "t5_routing": NAMED["t5_dropout"] | {"scores": {"kind": "routing", "clusters": 3, "assign": "balanced"}},
    "bert_routing": NAMED["bert_dropout"] | {"scores": {"kind": "routing", "clusters": 2, "assign": "balanced"}},
    "bert_entmax": NAMED["bert_gates"] | {"weights": {"kind": "entmax", "alpha": 2.0}},
}


FEEDBACK: dict[str, dict[str, Any]] = {
    "feedback": {"architecture": "feedback", "layers": 3},
    "feedback_window": {"architecture": "feedback", "memory": 4, "bias": True, "norm_position": "post"},
    "feedback_modern": {"architecture": "feedback", **_MODERN, "memory": 5},
    "feedback_dropout": {
        "architecture": "feedback",
        "dropout": 0.2,
        "attention_dropout": 0.1,
        "positions": "sinusoidal",
    },
}


def configured(**fields: Any) -> Any:
    """The configuration that these keys make."""
    return configure(fields)


def small(architecture: str = "parallel_encoder_decoder", **changes: Any) -> Any:
    """Two layers, C 16, N 12; learned dropout on."""
    shape = {"layers": 2, "width": 16, "heads": 2, "context": 12, "vocab_size": VOCABULARY}
    return configure({"architecture": architecture} | shape | changes)


def one_of(architecture: str, **changes: Any) -> Any:
    """The same of any architecture, for what is to hold for all that there are."""
    return small(architecture, **({"refine": {"chunk": 4}} if architecture == "refined" else {}) | changes)


def variant(name: str, **changes: Any) -> Any:
    return small(
        **((NAMED | EVERY | PATTERNED | PATTERNED_BOTH_WAYS | FEEDBACK | MIXED | MIXED_BOTH_WAYS)[name] | changes)
    )


def build(config: ModelConfig, seed: int = 0) -> TokenModel:
    torch.manual_seed(seed)
    return registry.build(config)


def batch_of(config: ModelConfig, sequences: int = 3, step: int = 5, first_sample: int = 100, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (sequences, config.context + 1), generator=generator)
    samples = torch.arange(first_sample, first_sample + sequences)
    batch = Batch(ids[:, :-1], ids[:, 1:], samples, torch.tensor(step), seed=9)
    if config.architecture == "two_stream":
        order = torch.rand(ids.shape, generator=generator).argsort(dim=1)
        return in_order(batch, ids, order, config.lengths[1])
    if not config.traits.two_sequences:
        return batch
    inputs, targets = config.lengths
    read, labels = ids[:, :inputs], ids.flip(0)[:, :targets]
    return replace(batch, input_ids=read, labels=labels, decoder_input_ids=labels.roll(1, dims=1))


def in_order(batch: Batch, ids: Tensor, order: Tensor, targets: int) -> Batch:
    """Tokens [B, T + 1] in an order of their places [B, T + 1], of which the last are to be predicted."""
    ids = ids.gather(1, order)
    read, asked = order[:, :-1], order[:, -targets:]
    return replace(batch, input_ids=ids[:, :-1], labels=ids[:, -targets:], position_ids=read, query_positions=asked)


def open_masks(model: TokenModel, shift: float = 1.57, std: float = 0.5) -> TokenModel:
    """Give the masks values all over [0, 1], as after training."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "dropout.shift" in name:
            torch.nn.init.constant_(parameter, shift)
        if "dropout.qkv" in name or "mask_source" in name:
            torch.nn.init.normal_(parameter, std=10 * std, generator=generator)
        if "dropout.scale" in name:
            torch.nn.init.normal_(parameter, std=40 * std, generator=generator)
        if name.endswith("ff.gate"):
            torch.nn.init.normal_(parameter, std=std, generator=generator)
        if name.endswith("ff.gate_bias"):
            torch.nn.init.constant_(parameter, shift)
        if name.endswith("halting.weight"):
            torch.nn.init.normal_(parameter, std=10 * std, generator=generator)
        if "dropout.log_alpha" in name:
            torch.nn.init.normal_(parameter, std=2 * std, generator=generator)
    return model


def without_dropout() -> LearnedDropoutConfig:
    return LearnedDropoutConfig(enabled=False)


VARIANTS, NOT_CAUSAL = _together(_CAUSAL), _together(_BOTH_WAYS)
"""Few rich variants, for suites that are to hold for each option: `a+b` has the options of both."""
EVERY = VARIANTS | NOT_CAUSAL

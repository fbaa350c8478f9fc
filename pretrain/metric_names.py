"""The one registry of metrics: the name of each in the journal and in the model, and how it is shown.

A metric is its name in the journal, so it is used as a key as it stands: `values[LOSS]`. Nothing else spells these
names. In MLflow they are the same, but for the characters that it refuses (pretrain/tracking/mlflow_names.py).
"""

from typing import NamedTuple, Self

REGISTRY: dict[str, "Metric"] = {}
"""By name, in the order in which they are told."""


class Column(NamedTuple):
    """How a terminal shows a metric."""

    title: str
    width: int
    digits: str = ""
    """A format; without one four digits, or as many of a small number."""


class Metric(str):
    """A name in the journal, and what belongs to it."""

    unit: str
    """As a plot's axis says it."""
    of_model: str | None
    """What the model calls it, where it comes from there."""
    column: Column | None

    def __new__(cls, name: str, unit: str, *, of_model: str | None = None, column: Column | None = None) -> Self:
        """Enter it into the registry."""
        metric = super().__new__(cls, name)
        metric.unit, metric.of_model, metric.column = unit, of_model, column
        assert name not in REGISTRY, name
        REGISTRY[name] = metric
        return metric

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        """To another process goes the name."""
        return str, (str(self),)

    def of(self, part: str) -> str:
        """The same of a source, or of one mask (`enc_ff/00`): a name below this one."""
        return f"{self}/{part}"

    @property
    def family(self) -> str:
        """What the names below it begin with."""
        return f"{self}/"


TOTAL_LOSS = Metric("loss/total", "nats per token", of_model="loss", column=Column("loss", 9))
LOSS = Metric("loss/train", "nats per token", of_model="cross_entropy", column=Column("ce", 9))
ENTROPY = Metric("penalty/entropy", "bits", of_model="entropy", column=Column("entropy", 9))
L1 = Metric("penalty/l1", "mean mask", of_model="l1", column=Column("l1", 9))
ENTROPY_WEIGHT = Metric("penalty/entropy_weight", "factor", of_model="entropy_weight")
L1_WEIGHT = Metric("penalty/l1_weight", "factor", of_model="l1_weight")
L0 = Metric("penalty/l0", "share of gates", of_model="l0")
L0_WEIGHT = Metric("penalty/l0_weight", "factor", of_model="l0_weight")
BLOCK_PENALTY = Metric("penalty/blocks", "multiplier times excess", of_model="block_penalty")
BLOCK_ENTROPY = Metric("penalty/block_entropy", "bits", of_model="block_entropy")
BLOCK_ENTROPY_WEIGHT = Metric("penalty/block_entropy_weight", "factor", of_model="block_entropy_weight")
PONDER = Metric("penalty/ponder", "steps and remainder", of_model="ponder")
PONDER_WEIGHT = Metric("penalty/ponder_weight", "factor", of_model="ponder_weight")
ENCODER_LOSS = Metric("loss/encoder", "its own", of_model="encoder_loss")
EARLIER_LOSS = Metric("loss/earlier_step", "nats per token", of_model="earlier_cross_entropy")
REFINE_CHANGE = Metric("refine/change", "share of the vectors' norm", of_model="refine_change")
DRAFT_LOSS = Metric("loss/draft", "nats per hidden label", of_model="draft_cross_entropy")
LENGTH_LOSS = Metric("loss/length", "nats per target", of_model="length_cross_entropy")
Z_LOSS = Metric("loss/z", "mean of log² Z", of_model="z_loss")
VALIDATION = Metric("loss/val", "nats per label")
VALIDATION_PART = Metric("loss/val_part", "nats per label")
VALIDATION_PERPLEXITY = Metric("loss/val_perplexity", "perplexity")
VALIDATION_DRAFT = Metric("loss/val_draft", "nats per hidden label")
VALIDATION_IN_ORDER = Metric("loss/val_in_order", "nats per label")
VALIDATION_ACCURACY = Metric("labels/val_accuracy", "share of labels")
VALIDATION_F1 = Metric("labels/val_f1", "F1, mean over labels or answers")
VALIDATION_EXACT = Metric("labels/val_exact", "share of answers")
BITS_PER_BYTE = Metric("loss/val_bits_per_byte", "bits per byte")
DENSITY = Metric("gate/density", "share of open gates", of_model="density", column=Column("density", 8))
GATE_ENTROPY = Metric("gate/entropy", "bits")
MASK_MEAN = Metric("gate/mask_mean", "mean m", of_model="mask_mean")
MASK_SLOPE = Metric("gate/mask_slope", "mean of abs(dm/dangle)", of_model="mask_slope")
NEAR_ZERO = Metric("gate/mask_near_zero", "share below 0.1", of_model="mask_near_zero")
NEAR_ONE = Metric("gate/mask_near_one", "share above 0.9", of_model="mask_near_one")
MULTIPLIER = Metric("gate/multiplier", "of the density's penalty", of_model="multiplier")
PONDER_STEPS = Metric("ponder/steps", "steps a token", of_model="ponder_steps", column=Column("steps", 6, ".2f"))
PONDER_SHARE = Metric("ponder/share", "share of tokens", of_model="ponder_share")
VALIDATION_PONDER = Metric("ponder/val_steps", "steps a token")
FLIPS = Metric("gate/flips", "share of elements")
VALIDATION_DENSITY = Metric("gate/val_density", "share of open gates")
ALPHA = Metric("attention/alpha", "alpha of entmax", of_model="alpha")
ZEROS = Metric("attention/zeros", "share of visible keys with weight 0", of_model="zeros")
SPAN = Metric("attention/span", "tokens", of_model="span")
DROPPED = Metric("attention/dropped", "share of the pairs in clusters that are left out", of_model="dropped")
FULLEST = Metric("attention/fullest", "share of tokens in the fullest cluster", of_model="fullest")
EMPTY = Metric("attention/empty", "share of clusters without a token", of_model="empty")
SPAN_WEIGHT = Metric("penalty/span_weight", "factor", of_model="span_weight")
GRAD_NORM = Metric("optim/grad_norm", "norm before clipping", column=Column("grad", 8, ".3f"))
LEARNING_RATE = Metric("optim/lr", "learning rate", column=Column("lr", 9, ".2e"))
SKIPPED = Metric("optim/skipped", "steps")
PARAM_NORM = Metric("optim/param_norm", "norm")
UPDATE_RATIO = Metric("optim/update_ratio", "update to weight norm")
TOKENS_PER_SECOND = Metric("time/tokens_per_second", "tokens per second", column=Column("tok/s", 9, ",.0f"))
TOKENS_PER_SECOND_PER_DEVICE = Metric("time/tokens_per_second_per_device", "tokens per second")
MFU = Metric("time/mfu", "model FLOPs utilisation", column=Column("mfu", 7, ".1%"))
STEP_MS = Metric("time/step_ms", "ms")
DATA_MS = Metric("time/data_ms", "ms a step")
FORWARD_MS = Metric("time/forward_ms", "ms a step")
BACKWARD_MS = Metric("time/backward_ms", "ms a step")
OPTIMIZER_MS = Metric("time/optimizer_ms", "ms a step")
CHECKPOINT_MS = Metric("time/checkpoint_ms", "ms a step")
GOODPUT = Metric("time/goodput", "share of time that trained")
RANK_SPREAD = Metric("time/rank_spread", "slowest rank over the mean")
TOKENS_SEEN = Metric("data/tokens_seen", "tokens")
SAMPLES_SEEN = Metric("data/samples_seen", "samples")
EPOCH = Metric("data/epoch", "epochs")
MEMORY = Metric("system/memory_gib", "GiB a device", column=Column("GiB", 7, ".2f"))
PEAK_MEMORY = Metric("system/peak_memory_gib", "GiB a device")
HOST_MEMORY = Metric("system/host_memory_gib", "GiB a process")
RESTARTS = Metric("health/restarts", "restarts")
STEPS_SKIPPED = Metric("health/skipped", "steps")
SPIKES = Metric("health/spikes", "spikes")
ROLLBACKS = Metric("health/rollbacks", "rollbacks")

OF_MODEL = {metric.of_model: metric for metric in REGISTRY.values() if metric.of_model}
OF_PARTS = (ALPHA, ZEROS, SPAN, DROPPED, FULLEST, EMPTY, PONDER_SHARE, REFINE_CHANGE)
"""Of each head, such as `attention/alpha/dec_sa/00/h0`, or each step."""
COLUMNS: tuple[tuple[Metric, Column], ...] = tuple(
    (metric, metric.column) for metric in REGISTRY.values() if metric.column
)
"""What a terminal shows of a step, in this order."""


def of_model(name: str) -> str:
    """What the journal calls a metric of the model; one of a single mask, `density/enc_ff/00`, stays below its family,
    and so does one of a step of refinement, `refine_change/01`.

    Those that have no name of their own here are the gates'.
    """
    family, _, part = name.partition("/")
    metric = OF_MODEL.get(family)
    if part and metric and metric in OF_PARTS:
        return metric.of(part)
    return OF_MODEL.get(name) or f"gate/{name}"


def epoch_of(source: str) -> str:
    """How often one of several sources has been read."""
    return f"{EPOCH}_{source}"


LABEL_SCORES = {VALIDATION_ACCURACY: "accuracy", VALIDATION_EXACT: "exact", VALIDATION_F1: "F1"}
"""How often labels are right, and how people say it."""


def of_validation(gate: str) -> str:
    """A gate's statistic under evaluation rounding."""
    return f"gate/val_{gate}"

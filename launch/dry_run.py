"""What `duet train --dry-run` says: everything is checked, nothing is written."""

from data_pipeline.errors import DataError
from pretrain.config import Config


def describe(config: Config, ranks: int) -> str:
    """The run in a few lines.

    Raises:
        UserError: what would stop the run at its start.
    """
    from data_pipeline.dataset import Dataset
    from model import registry

    dataset = Dataset.open(config.data.path)
    windows = len(dataset.windows("train", config.model.context))
    if not len(dataset.windows("validation", config.model.context, partial=True)):
        raise DataError(f"{config.data.path}: no validation text")
    import torch

    vocabulary = dataset.manifest.tokenizer.vocab_size
    with torch.device("meta"):
        model = registry.build(config.model.model_copy(update={"vocab_size": vocabulary}))
    micro_batch, accumulation = config.micro_batches(ranks)
    samples = config.global_batch * config.train.steps
    folder = config.run_dir
    return "\n".join(
        [
            f"run        {folder}" + (" (goes on)" if (folder / "run.json").exists() else " (new)"),
            f"model      {config.model.architecture}, {sum(p.numel() for p in model.parameters()):,} parameters",
            f"data       {config.data.path}: {windows:,} windows of {config.model.context} tokens",
            f"batch      {config.batch.tokens:,} tokens = {ranks} rank(s) x {accumulation} x {micro_batch} sequences",
            f"steps      {config.train.steps:,}: {samples * config.model.context:,} tokens, "
            f"{samples / windows:.2f} epochs",
            f"engine     ZeRO {config.engine.zero_stage}, {config.engine.precision}",
        ]
    )

"""What `duet train --dry-run` says: everything is checked, nothing is written."""

from pretrain.config import Config


def describe(config: Config, ranks: int) -> str:
    """The run in a few lines.

    Raises:
        UserError: what would stop the run at its start.
    """
    import torch

    from data_pipeline.dataset import Dataset
    from model import registry
    from pretrain import origin
    from pretrain.batches import Batches
    from pretrain.dataset_identity import complete, identity
    from pretrain.run import RunFolder

    dataset = Dataset.open(config.data.path)
    windows = len(dataset.windows("train", config.model.context))
    dataset.windows("validation", config.model.context, partial=config.data.objective != "span_corruption")
    Batches.of(config, dataset, torch.device("cpu"))  # needs pieces of the tokenizer
    config = origin.resolve(complete(config, dataset))
    origin.check(config, identity(config, dataset))
    folder = RunFolder(config.run_dir)
    if folder.run_file.exists():
        folder.check(config, identity(config, dataset))
    with torch.device("meta"):
        model = registry.build(config.model)
    micro_batch, accumulation = config.micro_batches(ranks)
    start = [f"begins at  {config.run.start_from}"] if config.run.start_from else []
    samples = config.global_batch * config.train.steps
    return "\n".join(
        [
            f"run        {folder.path}" + (" (goes on)" if folder.run_file.exists() else " (new)"),
            *start,
            f"model      {config.model.architecture}, {sum(p.numel() for p in model.parameters()):,} parameters",
            f"data       {config.data.path}: {windows:,} windows of {config.model.context} tokens",
            f"batch      {config.batch.tokens:,} tokens = {ranks} rank(s) x {accumulation} x {micro_batch} sequences",
            f"steps      {config.train.steps:,}: {samples * config.model.context:,} tokens, "
            f"{samples / windows:.2f} epochs",
            f"engine     ZeRO {config.engine.zero_stage}, {config.engine.precision}",
        ]
    )

"""What `duet train --dry-run` says: everything is checked, nothing is written."""

from pretrain.config.schema import Config


def describe(config: Config, ranks: int) -> str:
    """The run in a few lines.

    Raises:
        UserError: what would stop the run at its start.
    """
    import torch

    from data_pipeline.sampling import packing_plan
    from data_pipeline.sampling.sample_plan import Plan, wanted_phase
    from data_pipeline.storage.dataset import Dataset
    from model.architectures import registry
    from pretrain.config.dataset_identity import complete, identity
    from pretrain.evaluation.batches import Batches
    from pretrain.evaluation.evaluate import held_out
    from pretrain.run import origin
    from pretrain.run.run_folder import RunFolder

    dataset = Dataset.of(config.data)
    config.objective.check(dataset)
    windows = None
    if config.data.packing == "plain" or packing_plan.prepared(dataset, config.model.context):
        plan = Plan(dataset, wanted_phase(dataset, config.data, config.model.context), config.run.seed)
        windows = sum(len(of_source) for of_source in plan.windows.values())
        held_out(dataset, config)
    Batches.of(config, dataset, torch.device("cpu"))  # needs pieces of the tokenizer
    config = origin.resolve(complete(config, dataset))
    origin.check(config, identity(config, dataset))
    folder = RunFolder(config.run_dir)
    if folder.has_trained():
        folder.check(config, identity(config, dataset))
    with torch.device("meta"):
        model = registry.build(config.model)
    micro_batch, accumulation = config.micro_batches(ranks)
    start = [f"begins at  {config.run.start_from}"] if config.run.start_from else []
    samples = config.global_batch * config.train.steps
    read = f"{samples / windows:.2f} epochs" if windows else "packed into windows at the start"
    number = f"{windows:,} " if windows else ""
    return "\n".join(
        [
            f"run        {folder.path}" + (" (goes on)" if folder.run_file.exists() else " (new)"),
            *start,
            f"model      {config.model.architecture}, {sum(p.numel() for p in model.parameters()):,} parameters",
            f"data       {config.data.path}: {number}windows of {config.model.context} tokens",
            f"batch      {config.batch.tokens:,} tokens = {ranks} rank(s) x {accumulation} x {micro_batch} sequences",
            f"steps      {config.train.steps:,}: {samples * config.model.context:,} tokens, {read}",
            f"engine     ZeRO {config.engine.zero_stage}, {config.engine.precision}",
        ]
    )

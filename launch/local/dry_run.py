"""What `duet train --dry-run` says: everything is checked, nothing is written."""

from collections.abc import Iterator

from model.architectures.external import shown
from pretrain.config.schema import Config
from pretrain.run.run_folder import RunFolder


def describe(config: Config, ranks: int) -> str:
    """The run in a few lines.

    Raises:
        UserError: what would stop the run at its start.
    """
    import torch

    from data_pipeline.sampling import packing_plan
    from data_pipeline.sampling.sample_plan import Plan, told_shares, wanted_phase
    from data_pipeline.storage.dataset import Dataset
    from model.architectures import registry
    from pretrain.config.dataset_identity import complete, identity
    from pretrain.engine.hardware import check_hardware
    from pretrain.evaluation.batches import Batches
    from pretrain.evaluation.evaluate import held_out
    from pretrain.run import origin

    check_hardware(config, ranks, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    dataset = Dataset.of(config.data)
    config.objective.check(dataset)
    windows, shares = None, None
    if config.data.packing == "plain" or packing_plan.prepared(dataset, config.model.context):
        phase = wanted_phase(dataset, config.data, config.model.context)
        plan, shares = Plan(dataset, phase, config.run.seed), told_shares(dataset, config.data, phase)
        windows = sum(len(of_source) for of_source in plan.windows.values())
        held_out(dataset, config)
    Batches.of(config, dataset, torch.device("cpu"))  # needs pieces of the tokenizer
    config = origin.resolve(complete(config, dataset))
    origin.check(config, identity(config, dataset))
    folder = RunFolder(config.run_dir)
    if folder.has_trained():
        folder.check(config, identity(config, dataset))
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in registry.build(config.model).parameters())
    return "\n".join(_lines(config, ranks, parameters, windows, shares))


def _lines(config: Config, ranks: int, parameters: int, windows: int | None, shares: str | None) -> Iterator[str]:
    folder = RunFolder(config.run_dir)
    micro_batch, accumulation = config.micro_batches(ranks)
    samples = config.global_batch * config.train.steps
    read = f"{samples / windows:.2f} epochs" if windows else "packed into windows at the start"
    number = f"{windows:,} " if windows else ""
    yield f"run        {folder.path}" + (" (goes on)" if folder.run_file.exists() else " (new)")
    if config.run.start_from:
        yield f"begins at  {config.run.start_from}"
    yield f"model      {shown(config.model.architecture)}, {parameters:,} parameters"
    yield f"data       {config.data.path}: {number}windows of {config.model.context} tokens"
    if shares:
        yield f"           {shares}"
    yield f"batch      {config.batch.tokens:,} tokens = {ranks} rank(s) x {accumulation} x {micro_batch} sequences"
    yield f"steps      {config.train.steps:,}: {samples * config.model.context:,} tokens, {read}"
    yield f"engine     ZeRO {config.engine.zero_stage}, {config.engine.precision}"

"""An optimizer step on all ranks: DeepSpeed, the fragments it owns, optimizers, random states.

May import: data_pipeline.errors, data_pipeline.files, model.architectures, model.attention, model.batch, model.masks,
pretrain.config.
"""

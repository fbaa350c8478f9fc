"""Batches on the device, validation, samples and mask flips during training.

May import: data_pipeline.errors, data_pipeline.loading, data_pipeline.sampling, data_pipeline.storage,
data_pipeline.tokenize, model.architectures, model.batch, model.config, model.generation, model.masks,
pretrain.config, pretrain.engine, pretrain.metric_names, pretrain.objectives.
"""

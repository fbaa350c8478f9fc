"""Sharded checkpoints that any number of ranks and any ZeRO stage can read.

May import: data_pipeline.errors, data_pipeline.files, data_pipeline.sampling, model.architectures, pretrain.config,
pretrain.engine, pretrain.run.
"""

"""Ranks on this machine: one run, a study's runs, and a dry run.

May import: data_pipeline.errors, data_pipeline.files, data_pipeline.sampling, data_pipeline.storage,
model.architectures, model.config, model.costs, pretrain.config, pretrain.engine, pretrain.evaluation,
pretrain.export, pretrain.run, pretrain.status_line, pretrain.study.
"""

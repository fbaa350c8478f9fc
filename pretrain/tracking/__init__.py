"""Metrics from the ranks to the journal, the console and MLflow.

May import: data_pipeline.errors, data_pipeline.files, data_pipeline.places, data_pipeline.secret,
data_pipeline.storage, model.config, model.costs, model.masks, pretrain.config, pretrain.engine, pretrain.metric_names,
pretrain.report, pretrain.run, pretrain.status_line.
"""

"""The report of a run, or of several: HTML and pictures.

May import: data_pipeline.errors, data_pipeline.files, data_pipeline.secret, model.architectures,
pretrain.metric_names, pretrain.run.
"""

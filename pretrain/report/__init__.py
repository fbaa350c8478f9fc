"""The report of a run, or of several: HTML and pictures.

May import: data_pipeline.errors, data_pipeline.files, pretrain.metric_names, pretrain.run.
"""

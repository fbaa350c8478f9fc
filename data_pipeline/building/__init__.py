"""From sources to a published dataset, by any number of processes or tasks, the same bytes.

May import: data_pipeline.config, data_pipeline.errors, data_pipeline.files, data_pipeline.ingest,
data_pipeline.sampling, data_pipeline.storage, data_pipeline.tokenize.
"""

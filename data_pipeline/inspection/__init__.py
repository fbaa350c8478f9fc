"""What a dataset holds, how its tokenizer does, and which documents a step read.

May import: data_pipeline.building, data_pipeline.config, data_pipeline.ingest, data_pipeline.sampling,
data_pipeline.storage, data_pipeline.tokenize.
"""

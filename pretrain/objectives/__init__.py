"""What a model learns from: each objective makes inputs and labels of windows of tokens. Free of torch.

May import: data_pipeline.errors, data_pipeline.ingest, data_pipeline.sampling, data_pipeline.storage,
data_pipeline.tokenize.
"""

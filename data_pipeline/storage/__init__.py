"""A dataset on disk or at a URI: shards, manifest, token streams, the cache of a node.

May import: data_pipeline.config, data_pipeline.errors, data_pipeline.files, data_pipeline.ingest, data_pipeline.places,
data_pipeline.tokenize.
"""

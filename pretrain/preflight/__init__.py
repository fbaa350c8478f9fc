"""What is checked on the nodes before training. Free of torch at import.

May import: data_pipeline.config, data_pipeline.errors, data_pipeline.files, data_pipeline.storage, pretrain.config,
pretrain.planning.
"""

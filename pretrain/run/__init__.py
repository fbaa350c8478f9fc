"""The run folder: identity, journal, lease, records of attempts, and what they tell. Free of torch.

May import: data_pipeline.errors, data_pipeline.files, data_pipeline.places, data_pipeline.secret, model.architectures,
model.config, pretrain.config, pretrain.metric_names.
"""

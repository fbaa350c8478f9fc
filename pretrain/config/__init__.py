"""The configuration of a run: sections, loading, the schedule of the learning rate. Free of torch.

May import: data_pipeline.config, data_pipeline.counts, data_pipeline.errors, data_pipeline.files,
data_pipeline.may_change, data_pipeline.places, data_pipeline.secret, data_pipeline.storage, model.architectures,
model.config, pretrain.objectives.
"""

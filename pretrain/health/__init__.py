"""What a run notices about itself: steps that are not finite, spikes, hangs, trends; and the way back.

May import: data_pipeline.errors, data_pipeline.sampling, model.batch, pretrain.checkpoint, pretrain.config,
pretrain.engine, pretrain.metric_names, pretrain.run, pretrain.tracking.
"""

"""Jobs on a Slurm cluster: submission, its checks, the site, the code they run, requeueing, their state.

May import: data_pipeline.errors, data_pipeline.files, data_pipeline.places, data_pipeline.secret,
data_pipeline.storage, model.costs, pretrain.config, pretrain.metric_names, pretrain.planning, pretrain.run,
pretrain.tracking.
"""

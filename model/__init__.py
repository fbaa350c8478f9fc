"""The architectures, their parts, noise, losses and generation. Knows nothing of data, engines or process groups."""

import duet_pretrain

duet_pretrain.check("data_pipeline")

"""Stage II, speech to speech: gate fusion and the speech LM, the rest frozen (paper section 4.1).

omni2 train --config stage2 --set checkpoint=runs/1b/final --set data=dialogues --out runs/2

--set mix=sum and --set mix=hidden are the ablations of gate fusion (table 2).
--set hidden=states reads the LLM's hidden states from the disk, once they are computed by

omni2 hidden --config stage2 --set checkpoint=runs/1b/final --set data=dialogues --out states
"""

from omni2_jax.train.settings import Bucket, OptimizerConfig, TrainConfig

config = TrainConfig(
    stage="2",
    batch=32,
    epochs=1,
    optimizer=OptimizerConfig(peak=1e-3),
    buckets=(
        Bucket(1, 512, 512),
        Bucket(1, 512, 1024),
        Bucket(2, 1024, 1024),
        Bucket(3, 1536, 1024),
        Bucket(5, 2560, 1024),
    ),
)

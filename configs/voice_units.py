"""Stage "units": the speech tokenizer of one voice, on a CPU.

omni2 new --config voice --parts speech_tokenizer --out start
omni2 prepare --source voice --split train --out recordings
omni2 prepare --source voice --split test --out held-out
omni2 train --config voice_units --set checkpoint=start --set data=recordings \
    --set validation=held-out --out runs/units

On one CPU core a step takes about 0.3 s of CPU time; recipes/environment.sh says how glibc is
kept from returning buffers to the system after every step.
"""

from omni2_jax.train.settings import Bucket, OptimizerConfig, TrainConfig

config = TrainConfig(
    stage="units",
    batch=16,
    steps=6000,
    optimizer=OptimizerConfig(peak=2e-3, final=0.02, beta2=0.98, decay=0.01),
    buckets=(Bucket(0, 0, 75), Bucket(0, 0, 125), Bucket(0, 0, 250)),
    dtype="float32",
    save_every=250,
    validate_every=250,
)

"""Work on many items, one at a time or many at once, that survives being killed.

A job maps items through one function. What comes back is written to a journal at once, so that the
same command goes on where a killed one stopped. The results are read in the order of the items, so
that they do not depend on how many workers there were, on which machines, or on what was killed.

    class Speaker:                                   # made once a process: load models here
        def __init__(self, engine: str): ...
        def __call__(self, dialogue: dict) -> Result:        # called by many threads
            samples = ...
            if not samples.any():
                raise Refused("silent", f"{self.engine} says nothing to {dialogue['text']!r}")
            name = f"wav/{dialogue['id']}.wav"
            return Result(dialogue | {"audio": name}, {name: wav_bytes(samples)})

    job = Job("clips", out, {"engine": engine}, functools.partial(Speaker, engine), workers=8)
    items = [Item(dialogue["id"], dialogue) for dialogue in dialogues]
    results = job.run(items, Where(workers, ray, shard), total=len(items))
    if results is not None:                          # None: this was one shard of several
        with atomic_write(out / "data.jsonl") as file:
            for outcome in results.accepted():
                file.write(json.dumps(outcome.value) + "\n")
        say(results.summary())                       # "98 clips; 2 refused: 2 x silent (...)"

`Job.run` says what is raised. The options of a command are the types in omni2_jax/cli/where.py.
"""

from omni2_jax.jobs.job import HERE, Job
from omni2_jax.jobs.journal import Outcome
from omni2_jax.jobs.loop import Item
from omni2_jax.jobs.pools import Refused, Result
from omni2_jax.jobs.results import Results
from omni2_jax.jobs.where import Shard, Where

__all__ = ["HERE", "Item", "Job", "Outcome", "Refused", "Result", "Results", "Shard", "Where"]

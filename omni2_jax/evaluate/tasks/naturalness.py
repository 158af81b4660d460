"""Naturalness of spoken answers, by networks that predict listeners' opinions (MOS, 1 to 5).

DNSMOS (Microsoft's, in the package speechmos): P.835's signal, background and overall quality, and
P.808's overall quality. UTMOS, which the paper uses: by a path to TorchScript weights that map
samples [1, N] at 16 kHz to a score; torch is imported only then.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from omni2_jax import jobs
from omni2_jax.audio import recordings
from omni2_jax.evaluate import estimates
from omni2_jax.evaluate.estimates import Estimate
from omni2_jax.evaluate.items import Item
from omni2_jax.evaluate.tasks.base import Heard, Metric, Scores, Task, TaskOptions
from omni2_jax.files import first_line

DNSMOS = {
    "dnsmos_ovrl": "ovrl_mos",
    "dnsmos_sig": "sig_mos",
    "dnsmos_bak": "bak_mos",
    "dnsmos_p808": "p808_mos",
}


class Naturalness(Task):
    """Mean opinion scores. An answer without speech has none."""

    needs_samples = True
    workers = 1  # ONNX Runtime and torch use all cores themselves
    metrics: ClassVar[Mapping[str, Metric]] = {
        "utmos": Metric("UTMOS"),
        "dnsmos_ovrl": Metric("DNSMOS OVRL"),
        "dnsmos_sig": Metric("DNSMOS SIG"),
        "dnsmos_bak": Metric("DNSMOS BAK"),
        "dnsmos_p808": Metric("DNSMOS P.808"),
    }

    def __init__(self, options: TaskOptions):
        super().__init__(options)
        self.utmos = options.utmos
        if self.utmos and not self.utmos.is_file():
            raise ValueError(f"there are no UTMOS weights at {self.utmos}")

    def describe(self) -> dict[str, Any]:
        content = self.utmos.read_bytes() if self.utmos else None
        return {
            "dnsmos": "speechmos, 16 kHz",
            "utmos_sha256": hashlib.sha256(content).hexdigest() if content else None,
        }

    def open(self) -> Callable[[Item, Heard], Scores]:
        from speechmos import dnsmos

        utmos = load_utmos(self.utmos) if self.utmos else None

        def score(item: Item, heard: Heard) -> Scores:
            if not heard.samples.size:
                raise jobs.Refused("no speech", f"{item.context}: the answer has no speech")
            rate = recordings.INPUT_RATE
            samples = np.clip(recordings.resample(heard.samples, heard.rate, rate), -1, 1)
            found: Any = dnsmos.run(samples, rate)
            scores = {name: float(found[key]) for name, key in DNSMOS.items()}
            return scores | ({"utmos": utmos(samples)} if utmos else {})

        return score

    def summarise(
        self, scores: Sequence[Scores], unanswered: Sequence[Item]
    ) -> dict[str, Estimate]:
        return {
            name: estimates.mean(values)
            for name in self.metrics
            if (values := [row[name] for row in scores if name in row])
        }


def load_utmos(path: Any) -> Callable[[np.ndarray], float]:
    """The function from samples [N] at 16 kHz to UTMOS. Raises ValueError naming the file."""
    import torch

    try:
        network = torch.jit.load(str(path), map_location="cpu").eval()
    except RuntimeError as error:
        raise ValueError(f"{path} is no TorchScript file: {first_line(error)}") from None

    def predict(samples: np.ndarray) -> float:
        with torch.inference_mode():
            output = network(torch.from_numpy(samples.astype(np.float32))[None])
        return float(output.reshape(-1).mean())

    return predict

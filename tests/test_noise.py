"""Questions in noise: how loud it is, that it is the same again, and the command."""

import numpy as np

from omni2_jax.audio import recordings
from omni2_jax.evaluate.items import read_items
from omni2_jax.evaluate.noise import in_noise
from omni2_jax.evaluate.results import Results
from tests.support.evaluations import write_answers, write_items


def test_the_noise_of_a_question(tmp_path):
    items = read_items(write_items(tmp_path))
    first, again, other = (
        in_noise(items, 10, seed, tmp_path / name)
        for seed, name in ((0, "first"), (0, "again"), (1, "other"))
    )
    for item, noisy in zip(items, first, strict=True):
        quiet = recordings.load(item.turns[0])
        noise = recordings.load(noisy.turns[0]) - quiet
        ratio = 10 * np.log10(np.mean(quiet**2) / np.mean(noise**2))
        assert abs(ratio - 10) < 0.2
        assert (noisy.name, noisy.references) == (item.name, item.references)
    sounds = [[item.turns[0].read_bytes() for item in found] for found in (first, again, other)]
    assert sounds[0] == sounds[1] and all(map(bytes.__ne__, sounds[0], sounds[2]))


def test_the_command(omni2, tmp_path):
    """A folder of answers does not hear; the questions it is asked are written for others."""
    data, answers = write_items(tmp_path / "data"), write_answers(tmp_path / "answers")
    out = tmp_path / "out"
    command = ["evaluate", "--task", "text-qa", "--system", answers, "--data", data]
    code, text, _ = omni2(*command, "--noise", 10, "--out", out)
    assert code == 0 and "noise 10 dB" in text
    assert Results.load(out / "results.json").dataset == "items, noise 10 dB"
    assert len(list((out / "questions" / "noise-10").glob("*.wav"))) == 4

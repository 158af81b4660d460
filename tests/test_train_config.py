"""Settings of a training run: values, faults with the nearest key, and what may change when
resumed.
"""

import dataclasses
import json
from pathlib import Path

import pytest

from omni2_jax.train import config_files, overrides, saved_states
from omni2_jax.train.settings import (
    MUTABLE_SETTINGS,
    Bucket,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
)
from tests.support.paths import ROOT

STAGES = ("text", "stage1a", "stage1b", "stage2", "flow", "voice_vocoder", "voice_flow", "vocoder")


def read(*changes: str, name: str = "stage1b") -> TrainConfig:
    return config_files.read(ROOT / "configs" / f"{name}.py", changes)


def fault(*changes: str) -> str:
    with pytest.raises(ValueError) as error:
        read(*changes)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", STAGES)
def test_config_files(name):
    assert read(name=name).stage == name.removeprefix("stage").removeprefix("voice_")
    assert overrides.changed(read(name=name), []) == read(name=name)


VALUES = {
    "batch=8": 8,
    "epochs=0.5": 0.5,
    "steps=100": 100,
    "steps=none": None,
    "strict=true": True,
    "strict=False": False,
    "dtype=float32": "float32",
    "data=some/where": "some/where",
    "data=2024": "2024",  # a text stays a text
    "data=a=b": "a=b",
    "validation=held out": "held out",
    "reset=('speech_lm',)": ("speech_lm",),
    "reset=speech_lm": ("speech_lm",),
    "reset=fusion, speech_lm": ("fusion", "speech_lm"),
    "reset=": (),
    "profile=3,5": (3, 5),
    "peak_flops=1e15": 1e15,
    "optimizer.peak=1e-4": 1e-4,
    "optimizer.peak=1": 1.0,
    " optimizer.ema = 0.999 ": 0.999,
    "mesh.tensor=2": 2,
    "buckets=[{'segments': 0, 'tokens': 64}]": (Bucket(0, 0, 64),),
    "optimizer={'peak': 0.5}": OptimizerConfig(peak=0.5),
    "mesh={'fsdp': 2}": MeshConfig(fsdp=2),
    "mesh=(1, 2, 4)": MeshConfig(1, 2, 4),
    "buckets=((1,66,0),)": (Bucket(1, 66, 0),),
    "buckets=((0, 0, 64), {'tokens': 128})": (Bucket(0, 0, 64), Bucket(1, 0, 128)),
    "buckets=(1,66,0)": (Bucket(1, 66, 0),),
    "buckets={'tokens': 64}": (Bucket(1, 0, 64),),
}


@pytest.mark.parametrize("change, value", VALUES.items())
def test_values(change, value):
    setting = read(change)
    for name in change.partition("=")[0].strip().split("."):
        setting = getattr(setting, name)
    assert setting == value and type(setting) is type(value)


def test_the_rest_stays_and_the_last_change_wins():
    assert read("batch=8", "batch=4", "optimizer.peak=1") == dataclasses.replace(
        read(), batch=4, optimizer=OptimizerConfig(peak=1.0)
    )
    assert read("optimizer={'peak': 0.5}", "optimizer.peak=2").optimizer == OptimizerConfig(
        peak=2.0
    )


FAULTS = {
    # Typos: the nearest key
    "optimiser.peak=1": "there is no 'optimiser.peak'; it is now called optimizer.peak",
    "optimizer.peek=1": "there is no 'optimizer.peek'; did you mean optimizer.peak?",
    "peak=1": "there is no 'peak'; did you mean optimizer.peak?",
    "bacth=8": "there is no 'bacth'; did you mean batch?",
    "batch.size=8": "there is no 'batch.size'; did you mean batch?",
    "zzzz=1": "--set zzzz=1: there is no 'zzzz'",
    "=1": "there is no ''",
    "batch": "--set batch: expected batch=value",
    "optimizer={'peek': 1}": "optimizer.peek: Unexpected keyword argument",
    "loss_chunk=64": "there is no 'loss_chunk'; it is now called loss_block",
    "optimiser={'peak': 1}": "there is no 'optimiser'; it is now called optimizer",
    "buckets=[{'token': 1}]": "buckets.0.token: Unexpected keyword argument",
    # Types
    "batch=many": "batch: Input should be a valid integer",
    "batch=1.5": "batch: Input should be a valid integer",
    "batch=[1,": "batch: Input should be a valid integer",
    "batch={[]: 1}": "batch: Input should be a valid integer",
    "batch=": "batch: Input should be a valid integer",
    "epochs=none": "epochs: Input should be a valid number",
    "strict=perhaps": "strict: Input should be a valid boolean",
    "stage=1c": "stage is '1c', expected text, 1a, 1b, 2",
    "remat=some": "remat: Input should be 'none', 'dots' or 'full'",
    "optimizer=1": "optimizer: Input should be a dictionary or an instance of OptimizerConfig",
    # Values
    "batch=0": "batch is 0, expected at least 1",
    "microbatches=5": "batch 32 cannot be cut into 5 microbatches",
    "microbatches=0": "microbatches is 0, expected at least 1",
    "save_every=0": "save_every is 0, expected at least 1",
    "seed=-1": "seed is -1, expected at least 0",
    "steps=0": "steps and epochs must be positive",
    "epochs=-1": "steps and epochs must be positive",
    "epochs=nan": "steps and epochs must be positive",
    "buckets=()": "buckets is empty; at least one is needed",
    "rank=4": "rank is for stage 1a; stage 1b does not use it",
    "mix=sum": "mix is for stage 2; stage 1b does not use it",
    "vocoder.segment=9": "vocoder is for stage vocoder; stage 1b does not use it",
    "vocoder.gan_from=-1": "vocoder: gan_from is -1, less than f0_steps, 0",
    "vocoder.harmonic_phases=-1": "vocoder: harmonic_phases is -1.0, expected at least 0",
    "vocoder.gan_peak=0": "vocoder: gan_peak is 0.0, expected more than 0",
    "vocoder.mel=-1": "vocoder: mel is -1.0, expected at least 0",
    "vocoder.resolutions=500": "vocoder: resolutions holds 500, expected a power of two",
    "vocoder.periods=(2,0)": "vocoder: periods holds 0, expected more than 0",
    "mu_steps=3": "mu_steps is for stage flow; stage 1b does not use it",
    "hidden=states": "hidden is for stage 2; stage 1b does not use it",
    "chunks=50": "chunks is for stage flow; stage 1b does not use it",
    "buckets=((1,2,3,4),)": "(1, 2, 3, 4) has 4 values, expected segments, positions, tokens",
    "buckets=((1,66,-1),)": "tokens is -1, expected at least 0",
    "buckets=(0,'x',1)": "buckets.0: Input should be a dictionary or an instance of Bucket",
    "profile=5,3": "profile is (5, 3), expected a first and a last step",
    "optimizer.peak=-1": "optimizer: peak is -1.0, expected more than 0",
    "optimizer.peak=nan": "optimizer: peak is nan, expected more than 0",
    "optimizer.clip=0": "optimizer: clip is 0.0, expected more than 0",
    "optimizer.warmup=3": "optimizer: warmup is 3.0, expected 0 to 1",
    "optimizer.ema=1.5": "optimizer: ema is 1.5, expected 0 to 1",
}


@pytest.mark.parametrize("change, expected", FAULTS.items())
def test_faults(change, expected):
    message = fault(change)
    assert message.startswith(f"--set {change.strip()}: ") or change == "batch"
    assert expected in message


def test_all_faults_at_once():
    message = fault("batch=0", "workers=0", "rank=2")
    assert all(
        expected in message for expected in ("batch is 0", "workers is 0", "rank is for stage 1a")
    )
    assert "did you mean" in fault("optimizer=1", "optimizer.peak=1")


def test_settings_of_a_stage():
    """They are accepted and checked by the stage that they belong to."""
    assert read("chunks=50,0", name="flow").chunks == (50, 0)
    assert read("chunks=50", name="flow").chunks == (50,)
    assert read("mix=sum", "layout=offline", name="stage2").mix == "sum"
    with pytest.raises(ValueError, match=r"chunks holds -1, expected at least 0$"):
        read("chunks=(-1,)", name="flow")
    with pytest.raises(ValueError, match=r"layout is for stage 1b and 2; stage 1a does not use it"):
        read("layout=offline", name="stage1a")


IMPORT = "from omni2_jax.train.settings import *"
FILES = {
    "raises": ("1 / 0", "ZeroDivisionError: division by zero"),
    "no Python": ("config = (", "SyntaxError"),
    "no config": (
        "settings = 1",
        "defines no `config` of type omni2_jax.train.settings.TrainConfig",
    ),
    "another type": (
        "config = {'stage': '1b'}",
        "defines no `config` of type omni2_jax.train.settings.TrainConfig",
    ),
    "a typo": (
        f"{IMPORT}\nconfig = TrainConfig(stage='1b', bacth=3)",
        "'bacth'; did you mean batch?",
    ),
    "a typo within": (
        f"{IMPORT}\nconfig = TrainConfig('1b', optimizer=OptimizerConfig(peek=3))",
        "'peek'; did you mean peak?",
    ),
    "an old name": (
        f"{IMPORT}\nconfig = TrainConfig('1b', loss_chunk=3)",
        "'loss_chunk'; it is now called loss_block",
    ),
    "an old class": (
        "from omni2_jax.train.settings import Optimiser",
        "; it is now called OptimizerConfig",
    ),
    "a wrong type": (
        f"{IMPORT}\nconfig = TrainConfig(stage='1b', data=3)",
        "data: Input should be a valid string",
    ),
    "a wrong value": (
        f"{IMPORT}\nconfig = TrainConfig(stage='1b', batch=0)",
        "batch is 0, expected at least 1",
    ),
}


@pytest.mark.parametrize("content, expected", FILES.values(), ids=FILES)
def test_bad_files(content, expected, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(content)
    with pytest.raises(ValueError) as error:
        config_files.read(path, ["batch=8"])
    assert str(error.value).startswith(f"config {path}") and expected in str(error.value)


def test_no_file(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"configs/stage1.py does not exist; did you mean \S*configs/stage1[ab].py\?",
    ):
        config_files.read(ROOT / "configs" / "stage1.py")
    with pytest.raises(ValueError, match=f"config {tmp_path} does not exist"):
        config_files.read(tmp_path)


def test_by_name(tmp_path, monkeypatch):
    """A shipped config by its name from any directory; a file of that name comes first."""
    monkeypatch.chdir(tmp_path)
    assert config_files.read("stage1b") == read()
    (tmp_path / "mine.py").write_text(f"{IMPORT}\nconfig = TrainConfig('2', seed=7)")
    assert config_files.read("mine.py").seed == 7
    shipped = "flow, nano_1a, .*, stage1a, stage1b, stage2, text, vocoder, .*voice_vocoder"
    for name in ("stage1", "omni2_7b", "__init__"):
        with pytest.raises(
            ValueError, match=rf"config {name} does not exist.*; shipped: {shipped}$"
        ):
            config_files.read(name)


# --- a run that is resumed


def run(out: Path, *changes: str) -> dict:
    """The metadata of a run."""
    return {"config": dataclasses.asdict(read(*changes)), "examples": 3, "steps": 9}


@pytest.fixture
def started(tmp_path) -> Path:
    saved_states.write_metadata(tmp_path / "run", run(tmp_path))
    return tmp_path / "run"


OTHER = {
    "mesh": "mesh.fsdp=2",
    "remat": "remat=none",
    "loss_block": "loss_block=64",
    "workers": "workers=1",
    "strict": "strict=true",
    "save_every": "save_every=3",
    "keep": "keep=9",
    "validation": "validation=other",
    "validate_every": "validate_every=7",
    "samples": "samples=0",
    "max_sample_text": "max_sample_text=5",
    "profile": "profile=1,2",
    "peak_flops": "peak_flops=1e12",
    "microbatches": "microbatches=2",
    "stage": "stage=1a",
    "checkpoint": "checkpoint=other",
    "data": "data=other",
    "batch": "batch=8",
    "epochs": "epochs=9",
    "steps": "steps=9",
    "seed": "seed=1",
    "optimizer": "optimizer.ema=0.5",
    "buckets": "buckets=[{'tokens': 8}]",
    "rank": "stage=1a rank=3",
    "hidden": "stage=2 hidden=other",
    "frames": "stage=2 frames=other",
    "replay": "stage=1a replay=0.5",
    "replay_data": "stage=1a replay=0.5 replay_data=other",
    "ctc": "stage=1a ctc=0.5",
    "ctc_steps": "stage=1a ctc=0.5 ctc_steps=5",
    "mel_masks": "stage=1a mel_masks=2",
    "layout": "layout=offline",
    "unit_noise": "unit_noise=0.1",
    "mix": "stage=2 mix=sum",
    "reset": "reset=('speech_lm',)",
    "chunks": "stage=flow chunks=(1,)",
    "whisper": "stage=units whisper=other",
    "mu_steps": "stage=flow mu_steps=5",
    "one_voice": "stage=flow one_voice=true",
    "vocoder": "stage=vocoder vocoder.gan_from=5",
    "dtype": "dtype=float32",
}


def test_settings_all_looked_at():
    assert OTHER.keys() == {field.name for field in dataclasses.fields(TrainConfig)}
    assert OTHER.keys() >= MUTABLE_SETTINGS


@pytest.mark.parametrize("key", OTHER)
def test_what_may_differ(started, key):
    """What changes the result may not, and is named; what changes speed, memory or reports may."""
    changes = OTHER[key].split(" ") if OTHER[key].startswith("stage=") else [OTHER[key]]
    now = run(started, *changes)
    if key in MUTABLE_SETTINGS:
        saved_states.check_metadata(started, now)
    else:
        named = ", ".join(change.partition("=")[0] for change in changes)
        names = [change.partition("=")[0] for change in changes]
        named = ", ".join(sorted(names, key=lambda name: name != "stage"))
        with pytest.raises(
            ValueError,
            match=rf"^{started} holds a run with another {named}; "
            "give another --out, or the same settings$",
        ):
            saved_states.check_metadata(started, now)


def test_other_data_of_the_same_name(started):
    with pytest.raises(ValueError, match="another examples, steps;"):
        saved_states.check_metadata(started, run(started) | {"examples": 4, "steps": 10})


def test_what_is_no_run(started, tmp_path):
    saved_states.check_metadata(started, run(started))
    saved_states.check_metadata(tmp_path / "new", run(started))
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / ".run.json.7.partial").write_text("{")  # killed within its first moment
    with saved_states.locked(tmp_path / "cut"):
        pass
    saved_states.check_metadata(tmp_path / "cut", run(started))
    (tmp_path / "file").write_text("mine")
    for directory in (tmp_path, tmp_path / "file"):
        with pytest.raises(
            ValueError, match=f"^{directory} exists and is not a run; give a new directory$"
        ):
            saved_states.check_metadata(directory, run(started))
    for content in ("{", "[]", json.dumps(3)):
        (started / "run.json").write_text(content)
        with pytest.raises(ValueError, match=r"run.json does not describe a run"):
            saved_states.check_metadata(started, run(started))


def test_a_run_of_an_older_version(started):
    """Its settings had other names, which the message translates."""
    content = json.loads((started / "run.json").read_text())
    content["config"]["optimiser"] = content["config"].pop("optimizer")
    content["config"]["loss_chunk"] = content["config"].pop("loss_block")
    (started / "run.json").write_text(json.dumps(content))
    names = "optimiser is now optimizer, loss_chunk is now loss_block"
    with pytest.raises(ValueError) as error:
        saved_states.check_metadata(started, run(started))
    assert str(error.value) == (
        f"{started}/run.json was written by an older version, whose settings had other names "
        f"({names}); start a new run with another --out"
    )


def test_a_missing_extra_is_no_fault_of_the_config(tmp_path):
    """The command line then says which extra to install."""
    path = tmp_path / "stage.py"
    path.write_text("raise ModuleNotFoundError('No module named grain', name='grain')")
    with pytest.raises(ModuleNotFoundError):
        config_files.read(path)
    path.write_text("import no_such_module")
    with pytest.raises(ValueError, match="no_such_module"):
        config_files.read(path)

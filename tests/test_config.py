"""config.json: every setting has a range, settings fit one another, and a fault is one line."""

import dataclasses
import json
from pathlib import Path

import pydantic
import pytest

from omni2_jax.config import (
    DecoderConfig,
    FlowConfig,
    HiftConfig,
    Omni2Config,
    SpeechEncoderConfig,
    SpeechTokenizerConfig,
)
from omni2_jax.models import speech_tokenizer


def settings(config) -> dict:
    return json.loads(json.dumps(dataclasses.asdict(config)))


def leaves(tree: dict, *path: str) -> list[tuple[str, ...]]:
    """The paths of everything in nested settings, inner objects too."""
    paths = []
    for name, value in tree.items():
        paths.append((*path, name))
        paths += leaves(value, *path, name) if isinstance(value, dict) else []
    return paths


def changed(tree: dict, path: tuple[str, ...], value: object) -> dict:
    first, *rest = path
    return tree | {first: changed(tree[first], tuple(rest), value) if rest else value}


def message(path: Path, content: str | bytes) -> str:
    """The message that refuses a config.json with this content, without its beginning."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=f"^{path}") as caught:
        Omni2Config.load(path)
    text = str(caught.value)
    assert len(text.splitlines()) == 1 and len(text) < 1000
    return text.removeprefix(str(path)).removeprefix(" is not an omni2-jax config").lstrip(": ")


def test_saved_and_loaded(tmp_path):
    for config in (Omni2Config(), Omni2Config().only("llm"), Omni2Config().only()):
        config.save(tmp_path / "config.json")
        assert Omni2Config.load(tmp_path / "config.json") == config


@pytest.mark.parametrize(
    "bad", [-1, 10**9, 10**19, 1e19, float("nan"), float("inf"), "x", [[]]], ids=repr
)
def test_no_setting_takes_nonsense(tmp_path, bad):
    """Negative, too large, not finite, of another type: each setting refuses and names it."""
    whole = settings(Omni2Config())
    for path in leaves(whole):
        if bad == 10**9 and path[-1] == "rope_theta":
            continue  # a base of 1e9 is possible
        if bad == -1 and path[-1] == "mel_mean":
            continue  # the mean of log-mels is negative
        if bad == "x" and path[-1] == "no_speech_reply":
            continue  # any text
        text = message(tmp_path / "config.json", json.dumps(changed(whole, path, bad)))
        assert text.startswith(".".join(path)), text


def test_null(tmp_path):
    """A part may be absent, and a hidden size that follows from the width; nothing else."""
    whole = settings(Omni2Config())
    parts = {path for path in leaves(whole) if len(path) == 1 and isinstance(whole[path[0]], dict)}
    optional = parts - {("tokens",)} | {("speech_encoder", "hidden")}
    for path in set(leaves(whole)) - optional:
        text = message(tmp_path / "config.json", json.dumps(changed(whole, path, None)))
        assert text.startswith(f"{'.'.join(path)} is None"), text


RELATIONS = [
    ({"llm.head_size": 0, "llm.heads": 13}, "llm: 13 heads do not divide the width of 896"),
    ({"llm.kv_heads": 3}, "llm: kv_heads is 3, expected a divisor of heads, which is 14"),
    ({"llm.head_size": 63}, "llm: head_size is 63, expected an even number"),
    ({"llm.vocabulary": 100}, "tokens.text_eos is [151645], expected ids below llm.vocabulary"),
    (
        {"units": 6562},
        "6562 units follow <sep>, which is 151665, but the speech LM has only 158227",
    ),
    ({"tokens.unit_eos": 158227}, "tokens.unit_eos is 158227, expected an id below"),
    ({"speech_encoder.heads": 19}, "speech_encoder: 19 heads do not divide the width of 1280"),
    ({"adapter.stride": 1501}, "adapter.stride is 1501, expected less than or equal to 1500"),
    ({"read": 0}, "read is 0, expected greater than or equal to 1"),
    ({"write": 0}, "write is 0, expected greater than or equal to 1"),
    ({"flow.width": 511}, "flow: 8 heads do not divide the width of 511"),
    ({"flow.units": 6560}, "flow.units is 6560, expected 6561, as units is"),
    ({"flow.speaker": 256}, "speaker.embedding is 192, expected 256, as flow.speaker is"),
    ({"flow.mels": 100}, "vocoder.mels is 80, expected 100, as flow.mels is"),
    ({"vocoder.hop": 8}, "vocoder: upsample [8, 5, 3] and hop 8 make 960 samples of a mel frame"),
    ({"vocoder.n_fft": 12}, "vocoder: n_fft is 12, expected a multiple of 2 * hop"),
    ({"vocoder.channels": 500}, "vocoder: channels is 500, expected a multiple of 8"),
    ({"vocoder.sample_rate": 16000}, "vocoder.sample_rate is 16000, expected 24000"),
    ({"vocoder.upsample_kernels": [16, 11]}, "vocoder: upsample_kernels has 2 entries, expected 3"),
    ({"vocoder.upsample_kernels": [16, 10, 7]}, "vocoder: upsample_kernels has 10 for a rate of 5"),
    (
        {"vocoder.resblock_dilations": [[1]]},
        "vocoder: resblock_dilations has 1 entries, expected 3",
    ),
    ({"vocoder.resblock_kernels": [3, 8, 11]}, "vocoder: resblock_kernels is [3, 8, 11], expected"),
    ({"speaker.layers": [12, 24]}, "speaker.layers.2 is missing"),
    ({"hift": {}, "vocoder": None}, "hift is called vocoder now; rename it"),
    (
        {"model_type": "x", "architectures": []},
        "model_type is a setting of Hugging Face's; convert",
    ),
    ({"llm.widht": 5}, "llm.widht is not the name of a setting"),
]


@pytest.mark.parametrize(("changes", "text"), RELATIONS, ids=str)
def test_settings_that_do_not_fit(tmp_path, changes, text):
    tree = settings(Omni2Config())
    for name, value in changes.items():
        tree = changed(tree, tuple(name.split(".")), value)
    assert message(tmp_path / "config.json", json.dumps(tree)).startswith(text)


@pytest.mark.parametrize(
    ("content", "text"),
    {
        "": "it is not JSON",
        "[]": "the content is [], expected an object",
        "[" * 5000: "it is not JSON: recursion limit exceeded",
        '{"llm": ' * 5000: "it is not JSON: recursion limit exceeded",
        '{"units": ' + "9" * 5000 + "}": "it is not JSON: number out of range",
        b'{"mix": "\xff"}': "it is not JSON",
    }.items(),
    ids=lambda value: str(value)[:20],
)
def test_not_a_configuration(tmp_path, content, text):
    assert message(tmp_path / "config.json", content).startswith(text)


def test_a_part_without_settings():
    config = Omni2Config(llm=None)
    config.need(Path("config.json"), "speech_lm", "fusion")
    with pytest.raises(ValueError, match=r"^config.json: llm is null, expected the part's sett"):
        config.need(Path("config.json"), "speech_lm", "llm")


def test_speech_positions():
    assert Omni2Config().speech_positions == 300
    with pytest.raises(ValueError, match="speech_encoder or adapter is null"):
        _ = Omni2Config(adapter=None).speech_positions
    short = Omni2Config(speech_encoder=SpeechEncoderConfig(frames=750))
    assert short.speech_positions == 150
    assert short.segment_samples == 15 * 16000 and short.only("llm").segment_samples == 0


def test_a_checkpoint_without_head_sizes(tmp_path):
    """Checkpoints written before head sizes were stated have width // heads."""
    tree = settings(Omni2Config(llm=DecoderConfig(width=1024, heads=16, kv_heads=8)))
    for name in ("head_size", "qkv_bias", "qk_norm"):
        del tree["llm"][name]
    (tmp_path / "config.json").write_text(json.dumps(tree))
    llm = Omni2Config.load(tmp_path / "config.json").llm
    assert llm and (llm.head_size, llm.qkv_bias, llm.qk_norm) == (64, True, False)


def test_parts_that_do_not_fit_are_not_saved(tmp_path):
    with pytest.raises(ValueError, match=r"vocoder.mels is 100, expected 80, as flow.mels is"):
        Omni2Config(vocoder=HiftConfig(mels=100)).save(tmp_path / "config.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (DecoderConfig, {"width": -1}),
        (DecoderConfig, {"heads": 13}),
        (FlowConfig, {"guidance": float("nan")}),
        (HiftConfig, {"upsample_kernels": (16, 11)}),
        (SpeechTokenizerConfig, {"overlap": 3000}),
    ],
)
def test_the_same_ranges_in_python(kind, fields):
    with pytest.raises(pydantic.ValidationError):
        kind(**fields)
    with pytest.raises(pydantic.ValidationError):
        dataclasses.replace(kind(), **fields)


def test_speech_tokenizer(tmp_path):
    """speech_tokenizer.json is read like config.json."""
    config, path = SpeechTokenizerConfig(fsmn_taps=11), tmp_path / speech_tokenizer.FILE
    speech_tokenizer.save_config(tmp_path, config)
    assert speech_tokenizer.load_config(tmp_path) == config
    tree = settings(config)
    for bad, text in (
        ({"digits": 40}, "digits is 40, expected less than or equal to 12"),
        ({"memory": 31}, "memory is called fsmn_taps now; rename it"),
        ({"overlap": 4}, "overlap is 4, expected a multiple of 8"),
    ):
        path.write_text(json.dumps(tree | bad))
        with pytest.raises(ValueError, match="speech_tokenizer.json is not a .*: " + text):
            speech_tokenizer.load_config(tmp_path)

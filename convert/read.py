"""Kinds of sources -> `Release`. Names and shapes are checked before data is read."""

import dataclasses
from pathlib import Path

import numpy as np

from omni2_jax.checkpoint import tokenizer
from omni2_jax.convert import (
    cosyvoice,
    ctranslate2,
    hugging_face,
    safetensors_files,
    vocabulary,
    vocoders,
)
from omni2_jax.convert.formats import onnx_file, torch_dims, torch_file, torch_object
from omni2_jax.convert.hugging_face import EMPTY_CONFIG
from omni2_jax.convert.plan import ConversionError, plan
from omni2_jax.convert.release import Release, plan_parts
from omni2_jax.convert.speech_lm import with_speech_lm
from omni2_jax.convert.tables import flow, omni2, speaker, speaker_onnx, whisper
from omni2_jax.convert.tables import speech_tokenizer as speech_tokenizer_tables
from omni2_jax.models import speech_tokenizer


def read_omni2(directory: Path, whisper_file: Path | None = None) -> Release:
    """A LLaMA-Omni2 release directory, with the speech encoder that lies in it.

    whisper_file: states the encoder's attention heads, nothing else is taken from it.
    Raises ConversionError, or ValueError for the tokenizers, if something is missing or damaged.
    """
    path = safetensors_files.weights_file(directory)
    sources = safetensors_files.tensors(path)
    config = hugging_face.omni2(directory, sources, whisper_file)
    tokenizer.check_chat_template(tokenizer.load(directory), directory)
    files = generation_file(directory) | tokenizer_files(directory, "tokenizer")
    files |= tokenizer_files(directory / "tts_tokenizer", "tts_tokenizer")
    files["assets/config.json"] = directory / "config.json"
    return Release(config, plan_parts(omni2.table(config), sources, config, path), files)


def generation_file(directory: Path) -> dict[str, Path | bytes]:
    """The generation_config.json to copy, if the directory has one."""
    path = directory / "generation_config.json"
    return {path.name: path} if path.exists() else {}


def tokenizer_files(directory: Path, folder: str) -> dict[str, Path | bytes]:
    """The files of a tokenizer, to be copied into `folder`.

    Raises ValueError if the directory has no readable tokenizer.
    """
    tokenizer.load(directory)
    return {
        f"{folder}/{name}": directory / name
        for name in tokenizer.FILES
        if (directory / name).exists()
    }


def read_llm(directory: Path, speech_lm: Path | None = None) -> Release:
    """A plain Hugging Face language model as the LLM, with <speech> added to its tokenizer.

    speech_lm: a second one, which becomes the speech LM (`with_speech_lm`).
    Raises ConversionError if its family is unknown, or if something is missing or damaged.
    """
    path = safetensors_files.weights_file(directory)
    config, family = hugging_face.language_model(directory)
    assert config.llm is not None
    table = family.table(config.llm).at("", "llm.")
    params = plan_parts(table, safetensors_files.tensors(path), config, path)
    text_tokenizer = vocabulary.read(directory)
    tokens = dataclasses.replace(config.tokens, speech=text_tokenizer.speech)
    files = generation_file(directory) | {
        f"tokenizer/{name}": file for name, file in vocabulary.with_speech(text_tokenizer).items()
    }
    release = Release(config.replace(tokens=tokens), params, files)
    return with_speech_lm(release, text_tokenizer, speech_lm) if speech_lm else release


def read_whisper(path: Path) -> Release:
    """An OpenAI Whisper .pt, or a Hugging Face or CTranslate2 directory, without the text decoder.

    Raises ConversionError if it is something else, or damaged.
    """
    hugging_face_names = False
    if ctranslate2.is_directory(path):
        weights = path / ctranslate2.FILE
        encoder, sources = ctranslate2.whisper(path)
    elif path.is_dir():
        hugging_face_names = True
        weights = safetensors_files.weights_file(path)
        sources = {
            name.removeprefix("model."): source
            for name, source in safetensors_files.tensors(weights).items()
        }
        encoder = hugging_face.whisper_directory(path)
    else:
        weights, sources = path, torch_file(path, "model_state_dict")
        heads = torch_dims(path).get("n_audio_head")
        encoder = hugging_face.speech_encoder(sources, "encoder.", path, heads)
    config = EMPTY_CONFIG.replace(speech_encoder=encoder)
    table = whisper.table(hugging_face_names).at("encoder.", "speech_encoder.")
    table = dataclasses.replace(
        table, dropped={r"(decoder|proj_out)\..*": "the text decoder is not part of LLaMA-Omni2"}
    )
    return Release(config, plan_parts(table, sources, config, weights))


def read_decoder(directory: Path) -> Release:
    """A cosy2_decoder directory: flow and vocoder with their yaml.

    campplus.onnx (the speaker encoder) and spk2info.pt (voices) are read where it has them.
    Raises ConversionError if something is missing, damaged or unknown.
    """
    flow_config, vocoder_config, yaml_file = cosyvoice.read(directory)
    vocoder = vocoders.of_config(vocoder_config)
    config = EMPTY_CONFIG.replace(flow=flow_config, vocoder=vocoder_config)
    files: dict[str, Path | bytes] = {f"assets/{yaml_file.name}": yaml_file}
    sources = {
        "flow.pt": torch_file(directory / "flow.pt"),
        vocoder.FILE: vocoder.plain_names(torch_file(directory / vocoder.FILE)),
    }
    table = flow.table().at("flow.pt: ", "flow.")
    table += vocoder.table(vocoder_config).at(f"{vocoder.FILE}: ", "vocoder.")
    campplus = directory / "campplus.onnx"
    if campplus.exists():
        sources[campplus.name] = speaker_onnx.from_onnx(onnx_file(campplus), str(campplus))
        speaker_config = speaker.infer_config(sources[campplus.name], str(campplus))
        config = config.replace(speaker=speaker_config)
        table += speaker.table(speaker_config).at(f"{campplus.name}: ", "speaker.")
        # It is never trained, and the released front end reads the file as it is.
        files[f"assets/{campplus.name}"] = campplus
    named = {
        f"{file}: {name}": source
        for file, tensors in sources.items()
        for name, source in tensors.items()
    }
    params = plan_parts(table, named, config, directory)
    voices = stored_voices(directory / "spk2info.pt", flow_config.speaker)
    return Release(config, params, files, voices)


def read_speech_tokenizer(path: Path) -> Release:
    """speech_tokenizer_v2.onnx, or the s3tokenizer package's state dict.

    Raises ConversionError if it is something else, or damaged.
    """
    sources = speech_tokenizer_tables.read(path)
    config = speech_tokenizer_tables.infer_config(sources, str(path))
    shapes = speech_tokenizer.abstract(config)[1]
    params = plan(speech_tokenizer_tables.table(), sources, shapes, str(path))
    return Release(EMPTY_CONFIG, {"speech_tokenizer": params}, speech_tokenizer=config)


def stored_voices(path: Path, size: int) -> dict[str, np.ndarray]:
    """The x-vectors [size] of a spk2info.pt, by the file's own names; {} if there is no such file.

    Raises ConversionError if an entry is no x-vector or its name cannot be a file's.
    """
    entries = torch_object(path) if path.exists() else {}
    try:
        x_vectors = {
            str(name): np.asarray(entry["embedding"], np.float32).reshape(-1)
            for name, entry in entries.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConversionError(
            f"{path} does not hold an x-vector for every voice: {error!r}"
        ) from None
    for name, x_vector in x_vectors.items():
        check_voice_name(name, path)
        if x_vector.shape != (size,) or not np.isfinite(x_vector).all():
            raise ConversionError(
                f"{path}: voice {name!r} has {x_vector.size} numbers, "
                f"expected an x-vector of {size} finite ones"
            )
    return x_vectors


def check_voice_name(name: str, context: Path | str) -> None:
    """A voice's name is also a file's name. Raises ConversionError if it cannot be."""
    if not name or name.startswith(".") or "\0" in name or "/" in name or "\\" in name:
        raise ConversionError(
            f"{context}: {name!r} cannot be the name of a voice; use letters, digits, '-' and '_'"
        )

"""Release files -> one checkpoint directory. Everything is checked by shape before a byte is written."""

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from omni2_jax import files
from omni2_jax.checkpoint import lazy, parameters, tokenizer, voices
from omni2_jax.config import PARTS, AdapterConfig, Omni2Config, SpeechTokenizerConfig
from omni2_jax.convert import cosyvoice, releases, start, vocabulary
from omni2_jax.convert.formats import onnx_file, torch_dims, torch_file, torch_object
from omni2_jax.convert.plan import ConversionError, Source, Table, plan
from omni2_jax.convert.tables import flow, hift, omni2, qwen2, speaker, speaker_onnx, whisper
from omni2_jax.convert.tables import speech_tokenizer as units_tables
from omni2_jax.models import speech_tokenizer
from omni2_jax.models.model import abstract_model

Written = Callable[[lazy.LazyArray], None]


@dataclass
class Release:
    """What one source gives: its share of the configuration, unread parameters by part, files to copy or their content, voices."""

    config: Omni2Config
    params: dict[str, Mapping] = field(default_factory=dict)
    files: dict[str, Path | bytes] = field(default_factory=dict)
    voices: dict[str, np.ndarray] = field(default_factory=dict)
    speech_tokenizer: SpeechTokenizerConfig | None = (
        None  # the speech tokenizer's, which is no part of the model
    )


def planned(
    table: Table, sources: Mapping[str, Source], config: Omni2Config, where: Path
) -> dict[str, Mapping]:
    """The parameters of every part in `config`, from one table whose targets start with the part's name."""
    return plan(table, sources, abstract_model(config)[1], str(where))


def read_omni2(directory: Path, whisper_file: Path | None = None) -> Release:
    """A LLaMA-Omni2 release directory; the speech encoder inside it wins over a Whisper file, which only tells its heads."""
    where = releases.weights(directory)
    sources = releases.tensors(where)
    config = releases.omni2(directory, sources, whisper_file)
    files = generation_file(directory) | tokenizer_files(directory, "tokenizer")
    files |= tokenizer_files(directory / "tts_tokenizer", "tts_tokenizer")
    files["assets/config.json"] = directory / "config.json"
    return Release(config, planned(omni2.table(config), sources, config, where), files)


def generation_file(directory: Path) -> dict[str, Path]:
    path = directory / "generation_config.json"
    return {path.name: path} if path.exists() else {}


def tokenizer_files(directory: Path, folder: str) -> dict[str, Path]:
    tokenizer.load(directory)
    return {
        f"{folder}/{name}": directory / name
        for name in tokenizer.FILES
        if (directory / name).exists()
    }


def read_qwen(directory: Path, speech_lm: Path | None = None) -> Release:
    """A plain Hugging Face Qwen2.5 directory as the LLM, <speech> added; a second one becomes the speech LM (`with_speech_lm`)."""
    where = releases.weights(directory)
    config = releases.qwen_directory(directory)
    table = qwen2.table(config.llm).at("", "llm.")
    params = planned(table, releases.tensors(where), config, where)
    plain = vocabulary.read(directory)
    config = config.replace(tokens=dataclasses.replace(config.tokens, speech=plain.speech))
    files = {f"tokenizer/{name}": file for name, file in vocabulary.with_speech(plain).items()}
    release = Release(config, params, generation_file(directory) | files)
    return with_speech_lm(release, plain, speech_lm) if speech_lm else release


def with_speech_lm(release: Release, plain: vocabulary.Plain, directory: Path) -> Release:
    """An LLM with a speech LM made of a plain, tied Qwen2.5: its text tokens' rows, then new ones for <sep> and the units (paper 2.2)."""
    where, path = releases.weights(directory), directory / "config.json"
    found = releases.qwen2(releases.read_json(path), path)
    if not found.tied:
        raise ConversionError(
            f"{path}: the embeddings are not tied; a speech LM's are, as in Qwen2.5-0.5B"
        )
    vocabulary.check_same(plain, directory)
    if found.vocabulary < plain.speech:
        raise ConversionError(
            f"{path}: vocab_size is {found.vocabulary}, but the tokenizer has {plain.speech} tokens"
        )
    table, alone = (
        qwen2.table(found).at("", "speech_lm."),
        releases.EMPTY_CONFIG.replace(speech_lm=found),
    )
    params = planned(table, releases.tensors(where), alone, where)
    files = {
        f"tts_tokenizer/{name}": file
        for name, file in vocabulary.with_units(plain, release.config.units).items()
    }

    tokens = dataclasses.replace(
        release.config.tokens, sep=plain.speech, unit_eos=plain.ids[vocabulary.UNIT_EOS]
    )
    found = dataclasses.replace(found, vocabulary=tokens.sep + 1 + release.config.units)
    embedding = params["speech_lm"]["embedding"]
    embedding["table"] = start.extended(
        embedding["table"], kept=tokens.sep, vocabulary=found.vocabulary
    )
    return Release(
        release.config.replace(speech_lm=found, tokens=tokens),
        release.params | params,
        release.files | files,
    )


def read_whisper(path: Path) -> Release:
    """An OpenAI Whisper .pt or a Hugging Face Whisper directory; the text decoder is dropped."""
    if path.is_dir():
        where = releases.weights(path)
        sources = {
            name.removeprefix("model."): source for name, source in releases.tensors(where).items()
        }
        encoder = releases.whisper_directory(path)
    else:
        where, sources = path, torch_file(path, "model_state_dict")
        encoder = releases.speech_encoder(
            sources, "encoder.", path, torch_dims(path).get("n_audio_head")
        )
    config = releases.EMPTY_CONFIG.replace(speech_encoder=encoder)
    table = whisper.table(hugging_face=path.is_dir()).at("encoder.", "speech_encoder.")
    table = dataclasses.replace(
        table, dropped={r"(decoder|proj_out)\..*": "the text decoder is not part of LLaMA-Omni2"}
    )
    return Release(config, planned(table, sources, config, where))


def read_decoder(directory: Path) -> Release:
    """A cosy2_decoder directory: flow.pt, hift.pt and their yaml; campplus.onnx and spk2info.pt where it has them."""
    flow_config, hift_config, yaml_file = cosyvoice.read(directory)
    config = releases.EMPTY_CONFIG.replace(flow=flow_config, vocoder=hift_config)
    files = {f"assets/{yaml_file.name}": yaml_file}
    sources = {
        "flow.pt: ": torch_file(directory / "flow.pt"),
        "hift.pt: ": hift.plain_names(torch_file(directory / "hift.pt")),
    }
    table = flow.table().at("flow.pt: ", "flow.") + hift.table(hift_config).at(
        "hift.pt: ", "vocoder."
    )
    campplus = directory / "campplus.onnx"
    if campplus.exists():
        sources["campplus.onnx: "] = speaker_onnx.from_onnx(onnx_file(campplus), str(campplus))
        config = config.replace(
            speaker=speaker.infer_config(sources["campplus.onnx: "], str(campplus))
        )
        table += speaker.table(config.speaker).at("campplus.onnx: ", "speaker.")
        files["assets/campplus.onnx"] = (
            campplus  # never trained; the released front end reads it as it is
        )
    named = {
        file + name: source for file, tensors in sources.items() for name, source in tensors.items()
    }
    return Release(
        config,
        planned(table, named, config, directory),
        files,
        stored_voices(directory / "spk2info.pt", flow_config.speaker),
    )


def read_speech_tokenizer(path: Path) -> Release:
    """speech_tokenizer_v2.onnx, or the s3tokenizer package's state dict."""
    sources = units_tables.read(path)
    config = units_tables.infer_config(sources, str(path))
    return Release(
        releases.EMPTY_CONFIG,
        {
            "speech_tokenizer": plan(
                units_tables.table(), sources, speech_tokenizer.abstract(config)[1], str(path)
            )
        },
        speech_tokenizer=config,
    )


def stored_voices(path: Path, size: int) -> dict[str, np.ndarray]:
    """The x-vectors of a spk2info.pt, by the file's own names."""
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
        check_name(name, path)
        if x_vector.shape != (size,):
            raise ConversionError(
                f"{path}: voice {name!r} has {x_vector.size} numbers, expected an x-vector of {size}"
            )
    return x_vectors


def check_name(name: str, where: Path | str) -> None:
    """A voice's name is also a file's name."""
    if not name or name.startswith(".") or "/" in name or "\\" in name:
        raise ConversionError(
            f"{where}: {name!r} cannot be the name of a voice; use letters, digits, '-' and '_'"
        )


def combine(given: Sequence[Release]) -> Release:
    """Several releases as one; two that bring the same part are an error."""
    whole = Release(releases.EMPTY_CONFIG)
    # The release that has the speech LM also knows the tokens and R/W; otherwise the one with an LLM does.
    for release in sorted(given, key=lambda r: (r.config.speech_lm is None, r.config.llm is None)):
        twice = set(whole.params) & set(release.params)
        if twice:
            raise ConversionError(
                f"{', '.join(sorted(twice))} would come from two sources; name only one of them"
            )
        base = whole.config if whole.params else release.config
        parts = {
            name: getattr(release.config, name) or getattr(whole.config, name)
            for name in PARTS
            if name != "fusion"
        }
        whole = Release(
            base.replace(**parts),
            whole.params | release.params,
            whole.files | release.files,
            whole.voices | release.voices,
            whole.speech_tokenizer or release.speech_tokenizer,
        )
    return completed(whole)


def completed(release: Release) -> Release:
    """With a new adapter and a new gate fusion where a release has what they join but not them: stages I(a) and II train these."""
    config, params = release.config, dict(release.params)
    if config.speech_encoder and config.llm and not config.adapter:
        config = config.replace(adapter=AdapterConfig())
        params["adapter"] = start.adapter(config)
    if config.llm and config.speech_lm and config.mix != "text" and "fusion" not in params:
        params["fusion"] = start.fusion(config)
    return dataclasses.replace(release, config=config, params=params)


def write(
    out: Path, release: Release, prompts: Mapping[str, Path], written: Written = lambda _: None
) -> None:
    """Make the checkpoint `out`, whole or not at all. prompts: voice name -> prompt wav or .npy x-vector."""
    with files.atomic_directory(out) as work:
        write_into(work, release, prompts, written)


def extend(
    out: Path,
    release: Release | None,
    prompts: Mapping[str, Path],
    written: Written = lambda _: None,
) -> None:
    """Add parts that a checkpoint lacks, and voices. Its config.json names them last, so a cut leaves the checkpoint as it was."""
    config = Omni2Config.load(out / "config.json")
    release = release or Release(config)
    # A fusion has no configuration of its own: it is there with the two that it joins.
    there = Release(
        config,
        {part: {} for part in PARTS if getattr(config, part, config.llm and config.speech_lm)},
    )
    there.params |= {"speech_tokenizer": {}} if (out / speech_tokenizer.FILE).exists() else {}
    if twice := [part for part in there.params if part in release.params]:
        raise ConversionError(f"{out} has {', '.join(twice)} already; convert into a new directory")
    whole = combine([there, release])
    release = dataclasses.replace(
        whole,
        params={part: params for part, params in whole.params.items() if part not in there.params},
    )
    try:
        remove_parts(out, release)  # what an earlier cut left behind
        write_into(out, release, prompts, written)
    except BaseException:
        remove_parts(out, release)
        raise


def remove_parts(directory: Path, release: Release) -> None:
    for part in release.params:
        files.remove_directory(directory / "params" / part)
    if release.speech_tokenizer:
        (directory / speech_tokenizer.FILE).unlink(missing_ok=True)


def write_into(
    directory: Path, release: Release, prompts: Mapping[str, Path], written: Written
) -> None:
    for name, content in release.files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            (directory / name).write_bytes(content)
        else:
            shutil.copyfile(content, directory / name)
    for part, params in release.params.items():
        parameters.save_part(directory, part, params, written)
    made = {
        name: voices.from_file(directory, release.config, path) for name, path in prompts.items()
    }
    for name, x_vector in (release.voices | made).items():
        voices.save(directory, name, x_vector)
    if release.speech_tokenizer:
        speech_tokenizer.save_config(directory, release.speech_tokenizer)
    release.config.save(directory / "config.json")

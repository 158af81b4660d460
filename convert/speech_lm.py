"""A plain language model becomes the speech LM: it gets rows for <sep> and the units.

Paper section 2.2.
"""

import dataclasses
from pathlib import Path

from omni2_jax.config import DecoderConfig
from omni2_jax.convert import families, json_files, safetensors_files, start, vocabulary
from omni2_jax.convert.hugging_face import EMPTY_CONFIG
from omni2_jax.convert.plan import ConversionError
from omni2_jax.convert.release import Release, plan_parts
from omni2_jax.convert.vocabulary import TextTokenizer


def with_speech_lm(release: Release, text_tokenizer: TextTokenizer, directory: Path) -> Release:
    """`release`, which has the LLM, with a speech LM made of the plain model in `directory`.

    text_tokenizer: the LLM's; both have to number their tokens alike.
    Raises ConversionError if the models do not go together, or if something is damaged.
    """
    weights, path = safetensors_files.weights_file(directory), directory / "config.json"
    stated = json_files.read(path)
    family = families.of_config(stated, path)
    plain = family.read_config(stated, path)
    check(plain, text_tokenizer, directory)
    config = EMPTY_CONFIG.replace(speech_lm=plain)
    table = family.table(plain).at("", "speech_lm.")
    params = plan_parts(table, safetensors_files.tensors(weights), config, weights)

    units = release.config.units
    files = vocabulary.with_units(text_tokenizer, units)
    tokens = dataclasses.replace(
        release.config.tokens,
        sep=text_tokenizer.speech,
        unit_eos=text_tokenizer.ids[vocabulary.UNIT_EOS],
    )
    extended = dataclasses.replace(plain, vocabulary=tokens.sep + 1 + units)
    embedding = params["speech_lm"]["embedding"]
    embedding["table"] = start.extended(
        embedding["table"], kept=tokens.sep, vocabulary=extended.vocabulary
    )
    return Release(
        release.config.replace(speech_lm=extended, tokens=tokens),
        release.params | params,
        release.files | {f"tts_tokenizer/{name}": file for name, file in files.items()},
    )


def from_llm(release: Release) -> Release:
    """The release with a speech LM that starts as its own LLM, with new rows for <sep> and units.

    It takes the place of a speech LM that is there, and reads the text alone, as in stage 1b.
    Raises ValueError without an LLM, or if the LLM cannot become a speech LM.
    """
    config, params = release.config, dict(release.params)
    if config.llm is None:
        raise ValueError("there is no llm that could become the speech LM")
    if not config.llm.tied:
        raise ValueError("the llm's embeddings are not tied; a speech LM's are")
    if config.llm.weights != "float":
        raise ValueError("the llm has int8 weights, which are not trained; see --dequantize")
    sep = config.tokens.sep
    speech_lm = dataclasses.replace(config.llm, vocabulary=sep + 1 + config.units)
    table = start.extended(params["llm"]["embedding"]["table"], sep, speech_lm.vocabulary)
    params["speech_lm"] = params["llm"] | {"embedding": {"table": table}}
    params.pop("fusion", None)
    return dataclasses.replace(
        release, config=config.replace(speech_lm=speech_lm, mix="text"), params=params
    )


def check(plain: DecoderConfig, text_tokenizer: TextTokenizer, directory: Path) -> None:
    """Raise ConversionError unless the model in `directory` can become the speech LM."""
    path = directory / "config.json"
    if not plain.tied:
        raise ConversionError(
            f"{path}: the embeddings are not tied; a speech LM's are, as in Qwen2.5-0.5B"
        )
    vocabulary.check_same(text_tokenizer, directory)
    if plain.vocabulary < text_tokenizer.speech:
        raise ConversionError(
            f"{path}: vocab_size is {plain.vocabulary}, "
            f"but the tokenizer has {text_tokenizer.speech} tokens"
        )

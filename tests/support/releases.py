"""Made-up releases and the converter's command, for the tests of the converter."""

import gzip
import json
import os
import re
import shutil
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from omni2_jax.checkpoint import tokenizer
from omni2_jax.cli.main import main
from tests.support.paths import GOLDENS

# Prefix of a tensor's name -> real dimension -> tiny one; the first prefix that fits counts. The
# dimensions are the 1.5B release's, where no two collide.
TINY = {
    "model.speech_encoder.": {1280: 128, 5120: 512, 128: 24, 1500: 40, 3: 3},
    "model.speech_projector.": {6400: 640, 2048: 56, 1536: 96},
    "speech_generator.model.": {896: 64, 4864: 112, 128: 32, 158227: 7000},
    "speech_generator.": {3072: 192, 1536: 96, 896: 64, 1792: 128},
    "": {1536: 96, 8960: 160, 256: 32, 151936: 440},
}
LAYERS = {"model.speech_encoder.": 2, "speech_generator.model.": 1, "": 3}


def convert(*args: object) -> str | int | None:
    """Run `omni2 convert` in this process -> 0, or the line of its error."""
    pytest.importorskip("torch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["omni2", "convert", *map(str, args)])
        with pytest.raises(SystemExit) as exit:
            main()
    return exit.value.code


def linked(source: Path, target: Path) -> Path:
    """A copy of a directory by links: what is replaced in it stays in it."""
    return shutil.copytree(source, target, copy_function=os.symlink)


def replace(path: Path, content: bytes | str) -> None:
    """Write a file in a linked copy."""
    path.unlink(missing_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def manifest(name: str) -> dict:
    """{"info": ..., "keys": {tensor: [shape, dtype]}} of a released file."""
    path = GOLDENS / "manifests" / f"{name}.json"
    return json.loads(
        path.read_text()
        if path.exists()
        else gzip.decompress(path.with_name(path.name + ".gz").read_bytes())
    )


def settings(info: dict) -> dict:
    """The config.json of a release whose dimensions a manifest states."""
    return {
        "model_type": "omni2_speech2s_qwen2",
        "stream_params": "(3,10)",
        **info["config"],
        "speech_generator": {"model_type": "qwen2", **info["speech_generator"]},
    }


def tiny_tensors() -> dict[str, np.ndarray]:
    """Random bfloat16 tensors under the names of the 1.5B release, with tied heads."""
    random, tensors = np.random.default_rng(0), {}
    for name, (shape, _) in manifest("llama_omni2_1.5B")["keys"].items():
        prefix = next(prefix for prefix in TINY if name.startswith(prefix))
        layer = re.search(r"(?:layers|blocks)\.(\d+)\.", name)
        if layer is None or int(layer[1]) < LAYERS[prefix]:
            tensors[name] = random.standard_normal(
                [TINY[prefix][size] for size in shape], np.float32
            ).astype(ml_dtypes.bfloat16)
    for part in ("", "speech_generator.model."):
        tensors[f"{part}lm_head.weight"] = tensors[f"{part}model.embed_tokens.weight"]
    return tensors


def tiny_release(directory: Path) -> dict[str, np.ndarray]:
    """Write a release and return its tensors. It has other dimensions than the goldens'.

    It is tied, in bfloat16 and in three shards, and has no Whisper file.
    """
    tensors = tiny_tensors()
    linked(GOLDENS / "omni2" / "tts_tokenizer", directory / "tts_tokenizer")
    for name in tokenizer.FILES:
        if (GOLDENS / "omni2" / name).exists():
            (directory / name).symlink_to(GOLDENS / "omni2" / name)
    weight_map = {
        name: f"model-{i % 3 + 1:05d}-of-00003.safetensors" for i, name in enumerate(tensors)
    }
    for shard in set(weight_map.values()):
        save_file(
            {name: tensor for name, tensor in tensors.items() if weight_map[name] == shard},
            directory / shard,
        )
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    (directory / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [422, 420], "repetition_penalty": 1.1})
    )
    llm = {
        "vocab_size": 440,
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
    }
    speech_lm = {
        "vocab_size": 7000,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    shared = {
        "num_key_value_heads": 2,
        "rope_theta": 5e5,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
    info = {
        "config": llm | shared | {"eos_token_id": 422},
        "speech_generator": speech_lm | shared | {"eos_token_id": 420},
    }
    stated = {
        "stream_params": "(2,5)",
        "tokenizer_model_max_length": 2048,
        "speech_encoder": "models/large-v3.pt",
        "torch_dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps(settings(info) | stated))
    return tensors

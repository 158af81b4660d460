"""Plain language models as Hugging Face directories: tiny, with random weights and a tokenizer."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.support.paths import GOLDENS
from tests.support.releases import replace

OMNI2 = GOLDENS / "omni2"
CASES = json.loads((OMNI2 / "tokenizer_cases.json").read_text())
TEXT_TOKENS = CASES["tts"]["len_llm_tokenizer"] - 1  # of the goldens' tokenizer, without <speech>
PADDING_ROWS = 15  # of the embedding table, behind the tokenizer's last token
THINKING = ("<think>", "</think>")

# What Qwen3's template does, in our words: it leaves out the thoughts of earlier answers, and
# where thinking is turned off, the next answer begins with an empty block of thoughts.
THINKING_TEMPLATE = """\
{%- for message in messages %}
    {%- set text = message.content %}
    {%- if message.role == 'assistant' %}
        {%- set text = text.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + text + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""


def edited(path: Path, edit: Any) -> None:
    """Change the content of a JSON file in place, with a function of it."""
    content = json.loads(path.read_text())
    edit(content)
    replace(path, json.dumps(content))


def plain_tokenizer(directory: Path, more: Sequence[str] = (), template: str | None = None) -> None:
    """The goldens' tokenizer without <speech>, and without the two files that Qwen's lack.

    more: tokens added behind the others, not special. template: another chat template.
    """
    directory.mkdir()
    for name in ("vocab.json", "merges.txt"):
        (directory / name).symlink_to(OMNI2 / name)
    content = json.loads((OMNI2 / "tokenizer.json").read_text())
    speech = content["added_tokens"].pop()
    described = [speech | {"content": token, "special": False} for token in more]
    content["added_tokens"] += [
        token | {"id": TEXT_TOKENS + i} for i, token in enumerate(described)
    ]
    (directory / "tokenizer.json").write_text(json.dumps(content))
    content = json.loads((OMNI2 / "tokenizer_config.json").read_text())
    content["additional_special_tokens"].remove("<speech>")
    speech = content["added_tokens_decoder"].pop(str(TEXT_TOKENS))
    for i, token in enumerate(more):
        described = speech | {"content": token, "special": False}
        content["added_tokens_decoder"][str(TEXT_TOKENS + i)] = described
    if template is not None:
        content["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(content))


def plain_qwen2(
    directory: Path,
    tied: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    width: int = 48,
    layers: int = 2,
) -> Path:
    """A Hugging Face Qwen2.5 directory, its embeddings padded past the tokenizer."""
    plain_tokenizer(directory)
    config = transformers.Qwen2Config(
        vocab_size=TEXT_TOKENS + PADDING_ROWS,
        hidden_size=width,
        intermediate_size=80,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        eos_token_id=422,
        rope_parameters={"rope_type": "default", "rope_theta": 30000.0},
    )
    torch.manual_seed(width)
    model = transformers.Qwen2ForCausalLM(config).to(dtype)
    with torch.no_grad():
        # Columns differ in their mean.
        model.model.embed_tokens.weight += 0.3 * torch.arange(width) / width
    model.save_pretrained(directory)
    # Qwen's own have no layer_types.
    edited(directory / "config.json", lambda content: content.pop("layer_types"))
    return directory


def plain_qwen3(
    directory: Path,
    tied: bool,
    width: int = 48,
    layers: int = 2,
    dtype: torch.dtype = torch.float32,
) -> tuple[Path, transformers.Qwen3ForCausalLM]:
    """A Hugging Face Qwen3 directory, and the model in it.

    Its four heads of 16 are wider than the model; the weights of the norms are random, too.
    """
    plain_tokenizer(directory, THINKING, THINKING_TEMPLATE)
    config = transformers.Qwen3Config(
        vocab_size=TEXT_TOKENS + PADDING_ROWS,
        hidden_size=width,
        head_dim=16,
        intermediate_size=80,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        eos_token_id=422,
        rope_parameters={"rope_type": "default", "rope_theta": 30000.0},
    )
    torch.manual_seed(width)
    model = transformers.Qwen3ForCausalLM(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    return directory, model

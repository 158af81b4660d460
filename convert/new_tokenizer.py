"""A tokenizer of its own for a model from nothing: a byte-level BPE learnt from a text.

Its ids have the order of Qwen2.5's, which the rest of the program knows: the tokens of the BPE,
then the special ones, <speech> last. Its chat template is Qwen2.5's (ChatML) without a system line.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from omni2_jax.checkpoint.tokenizer import SPEECH_TEXT
from omni2_jax.config import TokenConfig
from omni2_jax.convert.vocabulary import UNIT_EOS, Files, described

TURN_END = "<|im_end|>"
SPECIAL = (UNIT_EOS, "<|im_start|>", TURN_END, SPEECH_TEXT)
BYTES = 256  # tokens of single bytes, with which any text can be spelled
MIN_COUNT = 2  # how often a pair must stand in the text to become a token
ROLES = ("user\n", "assistant\n")  # what the chat template adds to every turn
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def learn(texts: Iterable[str], vocabulary: int, source: Path) -> Files:
    """The files of a tokenizer of exactly `vocabulary` tokens, the special ones included.

    source: where the texts come from, for messages. Raises ValueError if the vocabulary is smaller
    than the bytes and the special tokens, or larger than the text allows.
    """
    smallest = BYTES + len(SPECIAL)
    if vocabulary < smallest:
        raise ValueError(
            f"llm.vocabulary is {vocabulary}, expected at least {smallest}: "
            f"{BYTES} bytes and {len(SPECIAL)} special tokens"
        )
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    # Digits stay single tokens, so that every number is spelled in the same way.
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(SPECIAL),
        min_frequency=MIN_COUNT,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(with_roles(texts), trainer)
    largest = bpe.get_vocab_size() + len(SPECIAL)
    if largest < vocabulary:
        raise ValueError(
            f"{source} is too small for llm.vocabulary, which is {vocabulary}: "
            f"it gives {largest} tokens at most; expected more text, or a smaller vocabulary"
        )
    bpe.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in SPECIAL])
    return {
        "tokenizer.json": bpe.to_str(pretty=False).encode(),
        "tokenizer_config.json": f"{json.dumps(settings(vocabulary), indent=1)}\n".encode(),
    }


def with_roles(texts: Iterable[str]) -> Iterator[str]:
    """The texts, and a role before each: the model reads one with every turn."""
    for number, text in enumerate(texts):
        yield ROLES[number % len(ROLES)]
        yield text


def settings(vocabulary: int) -> dict:
    """The content of tokenizer_config.json."""
    first = vocabulary - len(SPECIAL)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {
            first + i: described(token, special=True) for i, token in enumerate(SPECIAL)
        },
        "additional_special_tokens": [token for token in SPECIAL if token != UNIT_EOS],
        "bos_token": None,
        "eos_token": TURN_END,
        "pad_token": UNIT_EOS,
        "unk_token": None,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


def token_ids(vocabulary: int) -> TokenConfig:
    """The ids of the special tokens of such a tokenizer, and <sep> in the place of <speech>."""
    first = vocabulary - len(SPECIAL)
    ids = {token: first + i for i, token in enumerate(SPECIAL)}
    return TokenConfig(
        speech=ids[SPEECH_TEXT],
        text_eos=(ids[TURN_END],),
        sep=ids[SPEECH_TEXT],
        unit_eos=ids[UNIT_EOS],
    )

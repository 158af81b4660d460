"""The public API: a loaded checkpoint that answers spoken questions in text and speech.

    model = Omni2.load("CKPT")
    answer = model.answer("question.wav", voice="jane")
    answer.text, answer.units, answer.waveform

`Omni2.stream` yields the same answer step by step, `Omni2.streams` answers many conversations,
`Omni2.session` is a conversation of several turns, and `Omni2.speak` says a text.
"""

import dataclasses
import functools
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from omni2_jax import remote, sharding
from omni2_jax.audio import features, recordings
from omni2_jax.audio.voice_activity import has_speech
from omni2_jax.checkpoint import embedded, generation_config, parameters, voices
from omni2_jax.checkpoint.tokenizer import Tokenizer
from omni2_jax.config import LANGUAGE_PARTS, Omni2Config
from omni2_jax.generate.batch import Batch
from omni2_jax.generate.engine import Engine, ResponseStream
from omni2_jax.generate.engine_config import EngineConfig, longest_answer
from omni2_jax.generate.options import Options
from omni2_jax.generate.prompts import (
    Conversation,
    Sound,
    forced_ids,
    load_segments,
    prompt_ids,
    split,
    turns_of,
)
from omni2_jax.generate.read_write_state import Request
from omni2_jax.generate.session import Reply, Session
from omni2_jax.models.forms import Form, for_serving
from omni2_jax.models.model import language_dtype

TEXT_PARTS = ("speech_encoder", "adapter", "llm")  # what answers in text need
# About what the chat template adds to a spoken turn, in positions; instructions are not counted.
TEMPLATE = 128
BUCKET = 256  # buffer sizes are multiples of this, so that few sizes are ever compiled
# What a text that is to be said is the answer to.
REPEAT = "Please repeat this: {}"
SAID_NOTHING = "the model said nothing: its speech LM wrote no unit"
DEFAULT_SLOTS = 8  # conversations that `Omni2.streams` answers at the same time at most
# Engines that a model keeps. One for a conversation has 2 GiB of buffers at 0.5B in float32.
MOST_ENGINES = 4


@dataclass(frozen=True)
class Answer:
    """A complete answer."""

    text: str
    units: list[int]  # 25 a second
    unit_text: str  # the units as the released scripts write them, "<12><6560>"
    waveform: np.ndarray | None  # float32 [N], 24 kHz; None without a decoder


class Omni2:
    """A checkpoint in memory, created by `load`.

    `answer` a recording or a conversation, or hold a `session`.
    """

    def __init__(
        self,
        directory: Path,
        config: Omni2Config,
        graph: nnx.GraphDef,
        params: dict,
        tokenizer: Tokenizer,
        defaults: dict,
    ):
        """directory: where voices are stored. params: a nested dict of arrays.

        defaults: the settings of generation_config.json.
        """
        self.directory, self.config, self.graph, self.params = directory, config, graph, params
        self.tokenizer, self.defaults = tokenizer, defaults
        self.dtype = language_dtype(params)
        self.engines: dict[EngineConfig, Engine] = {}  # the last used ones; the newest is the last
        self.made: weakref.WeakSet[Engine] = weakref.WeakSet()  # those that sessions hold, too
        self.voices: dict[str | None, jax.Array] = {}  # x-vectors of the voices used so far
        mesh = sharding.mesh_of(params)

        def encode(params: dict, segment: jax.Array) -> jax.Array:
            mel = features.log_mel(segment, mels=config.speech_encoder.mels)
            return nnx.merge(graph, params).encode_speech(mel.astype(self.dtype))[0]

        self._encode = jax.jit(
            sharding.within(mesh, encode), out_shardings=sharding.replicated(mesh)
        )

    @classmethod
    def load(
        cls,
        directory: str | Path | None = None,
        dtype: jnp.dtype | type | None = None,
        decoder: bool = True,
        mesh: Mesh | None = None,
        form: Form | None = None,
        read: int | None = None,
        write: int | None = None,
        speech: bool = True,
    ) -> "Omni2":
        """Read a checkpoint directory; None is the model that this package carries.

        dtype: of the language side; by default bfloat16 on accelerators, float32 on the CPU.
        decoder: whether to load flow and vocoder. mesh: the devices that share the model
        (`sharding.make_mesh`), by default one. If several processes hold these devices, all of them
        must make the same calls in the same order; all get the same answers.
        form: how the model lies in memory; by default what is best for the devices
        (`models.forms`).
        read, write: R and W of the read/write rule; by default the checkpoint's, with which the
        speech LM was trained.
        speech: False answers in text alone; neither speech LM nor decoder is loaded.
        Raises ValueError naming what is missing or damaged.
        """
        path = None if directory is None else remote.as_path(directory)
        directory = embedded.or_embedded(path, "Omni2.load(CKPT)")
        config, tokenizer, defaults = describe(directory, decoder, speech)
        config = config.replace(read=read or config.read, write=write or config.write)
        default = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
        if mesh:
            sharding.check(mesh, config.llm.width, config.llm.hidden)
        loaded = config.only(*parts_of(decoder, speech))
        graph, params = parameters.load(directory, loaded, jnp.dtype(dtype or default), mesh)
        graph, params = for_serving(graph, params, form, donate=True)
        return cls(directory, config, graph, params, tokenizer, defaults)

    def update(self, params: dict) -> None:
        """Replace the parameters by others of the same shapes. Nothing is compiled again."""
        self.params = params
        for engine in self.made:
            engine.params = params

    def hear(self, sound: Sound, long_turns: str = "refuse") -> list[jax.Array]:
        """Encode a spoken turn -> speech features [F, D] of every segment: 300 of 30 s.

        sound: a file, or samples [N] at 16 kHz, floats from -1 to 1 or int16. long_turns: "refuse"
        a turn that is longer than a segment, the speech encoder's window, "truncate" it, or "split"
        it into several segments.
        A checkpoint with a `no_speech_reply` hears nothing, [], where nobody speaks; `Session`
        then gives that reply. Raises ValueError for bad audio.
        """
        return self.encode(self.segments(sound, long_turns))

    def segments(self, sound: Sound, long_turns: str = "refuse") -> list[np.ndarray]:
        """The segments of a spoken turn, samples [N] at 16 kHz each, as `hear` encodes them.

        Nothing is computed on the devices. Raises ValueError for bad audio.
        """
        segments = load_segments(sound, long_turns, self.config.segment_samples)
        if self.config.no_speech_reply and not has_speech(segments):
            return []
        return segments

    def encode(self, segments: Sequence[np.ndarray]) -> list[jax.Array]:
        """Segments, samples [N] at 16 kHz of at most the window -> the features [F, D] of each."""
        if not segments:
            return []
        padded, _ = recordings.pad(segments, self.config.segment_samples)
        return [self._encode(self.params, segment[None]) for segment in padded]

    def voice(self, name: str | None) -> jax.Array | None:
        """The x-vector [192] of a voice; None without a decoder.

        name: of a stored voice, or a sound file; None is the first stored voice. Raises ValueError
        if there is neither.
        """
        if self.config.flow and name not in self.voices:
            self.voices[name] = jnp.asarray(voices.resolve(self.directory, self.config, name))
        return self.voices.get(name)

    def request(self, options: Options) -> Request:
        """The options as arrays; generation_config.json decides what they leave open."""
        return Request.of(self.config, options, self.defaults)

    def engine(self, options: Options, prompt: int, slots: int = 1) -> Engine:
        """The engine for prompts of up to `prompt` positions.

        Options that need the same buffers share an engine, so that nothing is compiled again. The
        MOST_ENGINES that were used last are kept; others live as long as a session or an answer
        that uses them.
        """
        units, speech = longest_answer(self.config, options.max_new_tokens, options.max_flush_units)
        max_units, left_chunks = round_up(units), options.left_chunks
        if self.config.flow and left_chunks is not None:
            # More chunks than the longest answer has would only cost memory.
            chunk = options.chunk or self.config.flow.chunk
            left_chunks = min(left_chunks, -(-max_units // chunk))
        engine_config = EngineConfig(
            slots=slots,
            prefill_size=self.tokenizer.positions + TEMPLATE,
            llm_capacity=round_up(prompt + options.max_new_tokens),
            speech_capacity=round_up(speech),
            max_units=max_units,
            flow_chunk=options.chunk,
            flow_left_chunks=left_chunks,
            flow_cache_dtype=options.flow_cache_dtype,
            units_only=options.unit_vocabulary == "units",
            seamless=options.seamless,
        )
        engine = self.engines.pop(engine_config, None)
        while len(self.engines) >= MOST_ENGINES:
            del self.engines[next(iter(self.engines))]
        if engine is None:
            engine = Engine(self.config, self.graph, self.params, engine_config)
            self.made.add(engine)
        self.engines[engine_config] = engine
        return engine

    def session(
        self,
        voice: str | None = None,
        options: Options | None = None,
        overflow: str = "error",
        turns: int | None = None,
        segments: int | None = None,
        instructions: str | None = None,
        positions: int | None = None,
    ) -> Session:
        """A conversation of several turns. overflow, instructions: see `Session`.

        turns, segments: how many spoken turns the conversation will have at most, and segments in
        them, if that is known: then the LLM's cache is made for these and the instructions,
        otherwise for the longest conversation that the checkpoint allows. positions: instead of
        both, as in `streams`; needed where long texts are asked.
        Raises ValueError for an unknown voice or overflow.
        """
        options = options or Options()
        if turns and not positions:
            positions = (segments or turns) * self.tokenizer.positions
            positions += turns * (TEMPLATE + options.max_new_tokens)
            positions += len(self.tokenizer.answer(instructions or ""))
        positions = min(positions or self.config.max_prompt, self.config.max_prompt)
        hear = functools.partial(self.hear, long_turns=options.long_turns)
        engine, request = self.engine(options, positions), self.request(options)
        return Session(
            hear, engine, self.tokenizer, request, self.voice(voice), overflow, instructions
        )

    def answer(
        self,
        conversation: Conversation,
        voice: str | None = None,
        options: Options | None = None,
    ) -> Answer:
        """Answer a spoken question, or the last turn of a conversation.

        A conversation has sounds at even places (the user's turns) and texts between them (the
        model's). A sound is a file, or samples [N] at 16 kHz, floats from -1 to 1 or int16. Raises
        the errors of `streams`.
        """
        return join(self.stream(conversation, voice, options), self.config.flow is not None)

    def stream(
        self,
        conversation: Conversation,
        voice: str | None = None,
        options: Options | None = None,
    ) -> Iterator[Reply]:
        """The same answer step by step. Raises the errors of `streams`."""
        (stream,) = self.streams([conversation], voice, options)
        return stream

    def streams(
        self,
        conversations: Sequence[Conversation],
        voice: str | None = None,
        options: Options | None = None,
        slots: int | None = None,
        positions: int = 0,
    ) -> list[Iterator[Reply]]:
        """The answers to any number of conversations, each step by step, in their order.

        slots: how many are answered at the same time (default: all, but DEFAULT_SLOTS at most). A
        conversation is encoded when a slot is free for it. Iterating over one answer also advances
        the others that have a slot. positions: of the longest prompt that will ever be given, if
        that is known: then the buffers made now will do for all.

        Raises ValueError for a conversation that is no conversation or too long, for an unknown
        voice, and for bad audio of the conversations that have a slot at once. Bad audio of a later
        one, and GenerationError, are raised by the iterator of its answer; the others are not
        affected.
        """
        options, conversations = options or Options(), list(conversations)
        if not conversations:
            return []
        x_vector, request = self.voice(voice), self.request(options)
        limit, long_turns = self.config.max_prompt, options.long_turns
        prompts = [
            prompt_ids(self.tokenizer, conversation, long_turns, limit)
            for conversation in conversations
        ]
        slots = slots or min(len(prompts), DEFAULT_SLOTS)
        engine = self.engine(options, max(positions, *map(len, prompts)), slots)

        def submit(ids: np.ndarray, conversation: Conversation) -> ResponseStream:
            window, say = self.config.segment_samples, self.config.no_speech_reply
            turns = [
                load_segments(turn, long_turns, window) for turn in turns_of(conversation)[::2]
            ]
            features = self.encode([segment for turn in turns for segment in turn])
            pieces = split(ids, features, engine.engine_config.prefill_size)
            forced = request
            if say and not has_speech(turns[-1]):
                forced = request.saying(forced_ids(self.tokenizer, say))
            return engine.submit(pieces, forced, x_vector)

        submits = [
            functools.partial(submit, *pair) for pair in zip(prompts, conversations, strict=True)
        ]
        batch = Batch(engine, self.tokenizer, submits)
        batch.start()
        return [batch.replies(index) for index in range(len(prompts))]

    def speak(self, text: str, voice: str | None = None, options: Options | None = None) -> Answer:
        """Say a text: the LLM is made to answer with it. Raises the errors of `stream_speech`."""
        return join(self.stream_speech(text, voice, options), self.config.flow is not None)

    def stream_speech(
        self, text: str, voice: str | None = None, options: Options | None = None
    ) -> Iterator[Reply]:
        """The same step by step. `Session.reply(question, say=text)` says it in a conversation.

        Raises ValueError for an unknown voice and a text that is empty, has special tokens, or is
        too long, QueueFullError, and GenerationError.
        """
        options = options or Options()
        tokens = len(forced_ids(self.tokenizer, text))
        limit = max(tokens, options.max_new_tokens)
        options = dataclasses.replace(options, max_new_tokens=limit)
        return self.session(voice, options, turns=1).reply(REPEAT.format(text), say=text)


def join(replies: Iterator[Reply], spoken: bool) -> Answer:
    """All replies of an answer as one. spoken: whether there is a decoder."""
    parts = list(replies)
    return Answer(
        text="".join(part.text for part in parts),
        units=[unit for part in parts for unit in part.units],
        unit_text="".join(part.unit_text for part in parts),
        waveform=np.concatenate([part.samples for part in parts]) if spoken else None,
    )


def parts_of(decoder: bool, speech: bool = True) -> tuple[str, ...]:
    """The parts of a checkpoint that answers need, with or without flow and vocoder.

    speech: False for answers in text alone.
    """
    if not speech:
        return TEXT_PARTS
    return (*LANGUAGE_PARTS, "flow", "vocoder") if decoder else LANGUAGE_PARTS


def describe(
    directory: Path, decoder: bool, speech: bool = True
) -> tuple[Omni2Config, Tokenizer, dict]:
    """Everything of a checkpoint but its parameters: config, tokenizer, generation_config.json.

    decoder, speech: see `parts_of`. Raises ValueError naming what is missing or damaged.
    """
    config = Omni2Config.load(directory / "config.json")
    present, needed = parameters.parts(directory), parts_of(decoder, speech)
    if config.mix == "text":  # the speech LM reads the text alone
        needed = tuple(part for part in needed if part != "fusion")
    missing = [part for part in needed if part not in present]
    if missing:
        can_write = speech and not set(missing) & set(TEXT_PARTS)
        hint = "; or answer in text alone (--text-only, speech=False)" if can_write else ""
        is_language = bool(set(missing) & set(LANGUAGE_PARTS))
        release = "LLaMA-Omni2 release with --omni2" if is_language else "decoder with --decoder"
        raise ValueError(
            f"{directory} lacks {', '.join(missing)}: add it with `omni2 convert` from a {release}"
            f"{hint}"
        )
    config.need(directory / "config.json", *needed)
    tokenizer = Tokenizer(directory, config, config.speech_positions)
    return config.only(*needed, "speaker"), tokenizer, generation_config.load(directory)


def round_up(size: int) -> int:
    """The next multiple of BUCKET."""
    return -(-size // BUCKET) * BUCKET

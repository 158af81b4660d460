"""What a user holds: a loaded checkpoint that answers spoken questions in text and speech.

    model = Omni2.load("CKPT")
    answer = model.answer("question.wav", voice="jane")
    answer.text, answer.units, answer.waveform

`Omni2.stream` gives the same answer as it is made, `Omni2.session` a conversation.
"""

import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from omni2_jax import sharding
from omni2_jax.audio import features, recordings
from omni2_jax.checkpoint import parameters, voices
from omni2_jax.checkpoint.tokenizer import Tokenizer
from omni2_jax.config import LANGUAGE_PARTS, Omni2Config
from omni2_jax.generate import read_write
from omni2_jax.generate.engine import Engine
from omni2_jax.generate.engine_config import EngineConfig, longest_answer
from omni2_jax.generate.read_write import Request
from omni2_jax.generate.sampling import Sampling
from omni2_jax.generate.session import Reply, Session, replies, split
from omni2_jax.models.model import for_serving, language_dtype

Sound = str | Path | np.ndarray  # a file, or samples [N] at 16 kHz
TEMPLATE = 128  # positions that the chat template puts around a turn, at most
BUCKET = (
    256  # capacities are rounded up to a multiple of this, so that few shapes are ever compiled
)


@dataclass(frozen=True)
class Options:
    """How to generate. None = what the checkpoint's generation_config.json says, else off."""

    temperature: float = 0.0  # of the text; 0 = greedy
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int = 256
    unit_temperature: float = 1.0  # the paper's; greedy falls into repetition
    unit_top_k: int = 50  # in force in the released code
    unit_vocabulary: str = "units"  # "all" = any token can be sampled, as released
    max_flush_units: int = 1024  # speech tokens after the end of the text
    seed: int = 0
    chunk: int | None = None  # units that the flow takes as one chunk; None = the checkpoint's 50
    left_chunks: int | None = (
        4  # chunks that the flow sees before its own; None = all, as released (9 MB a unit at real size)
    )
    long: str = "refuse"  # turns over 30 s: "refuse", "truncate" or "split"

    def __post_init__(self):
        for name, least in {
            "temperature": 0,
            "unit_temperature": 0,
            "max_new_tokens": 1,
            "max_flush_units": 1,
            "unit_top_k": 0,
        }.items():
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {least}")
        for name, least in {"chunk": 1, "left_chunks": 0}.items():
            if getattr(self, name) is not None and not getattr(self, name) >= least:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {least}")
        if self.repetition_penalty is not None and not self.repetition_penalty > 0:
            raise ValueError(
                f"repetition_penalty is {self.repetition_penalty}, expected more than 0"
            )
        if self.unit_vocabulary not in ("units", "all"):
            raise ValueError(
                f"unit_vocabulary is {self.unit_vocabulary!r}, expected 'units' or 'all'"
            )


@dataclass(frozen=True)
class Answer:
    """Text; units (25 a second) and the same as the released scripts spell them; waveform float32 [N] at 24 kHz, None without a decoder."""

    text: str
    units: list[int]
    unit_text: str
    waveform: np.ndarray | None


class Omni2:
    """A checkpoint in memory. `load` it; `answer` a wav or a conversation; or hold a `session`."""

    def __init__(
        self,
        directory: Path,
        config: Omni2Config,
        graph: nnx.GraphDef,
        params: dict,
        tokenizer: Tokenizer,
        defaults: dict,
    ):
        self.directory, self.config, self.graph, self.params = directory, config, graph, params
        self.tokenizer, self.defaults = tokenizer, defaults
        self.dtype = language_dtype(params)
        self.engines: dict[EngineConfig, Engine] = {}
        self.voices: dict[str | None, jax.Array] = {}  # those asked for so far
        mesh = sharding.mesh_of(params)
        hear = lambda params, clip: nnx.merge(graph, params).encode_speech(
            features.log_mel(clip, mels=config.speech_encoder.mels).astype(self.dtype)
        )[0]  # noqa: E731
        self._hear = jax.jit(sharding.within(mesh, hear), out_shardings=sharding.replicated(mesh))

    @classmethod
    def load(
        cls,
        directory: str | Path,
        dtype: jnp.dtype | None = None,
        decoder: bool = True,
        mesh: Mesh | None = None,
        unroll: bool | None = None,
    ) -> "Omni2":
        """Read a checkpoint directory. Raises ValueError naming what is missing or damaged.

        dtype: of the language side; by default bfloat16 on accelerators, float32 on the CPU. decoder: whether to load the audio side.
        mesh: the devices to share it (`sharding.make_mesh`), by default one. Where several processes hold them, each of them makes
        the same calls in the same order, and gets the same answers.
        unroll: run the layers one by one instead of in a scan; by default on CPUs only (`for_serving`).
        """
        directory = Path(directory)
        config = Omni2Config.load(directory / "config.json")
        wanted = (*LANGUAGE_PARTS, "flow", "vocoder") if decoder else LANGUAGE_PARTS
        missing = [part for part in wanted if part not in parameters.parts(directory)]
        if missing:
            source = (
                "LLaMA-Omni2 release with --omni2"
                if set(missing) & set(LANGUAGE_PARTS)
                else "cosy2_decoder with --decoder"
            )
            raise ValueError(
                f"{directory} lacks {', '.join(missing)}: add it with python -m convert from a {source}"
            )
        config.need(directory / "config.json", *wanted)
        tokenizer = Tokenizer(directory, config, config.speech_positions)
        defaults = generation_defaults(directory / "generation_config.json")
        dtype = dtype or (jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
        if mesh:
            sharding.check(mesh, config.llm.width, config.llm.hidden)
        graph, params = parameters.load(directory, config.only(*wanted), dtype, mesh)
        graph, params = for_serving(graph, params, unroll)
        return cls(directory, config.only(*wanted, "speaker"), graph, params, tokenizer, defaults)

    def update(self, params: dict) -> None:
        """Go on with other weights of the same shapes; nothing is compiled again."""
        self.params = params
        for engine in self.engines.values():
            engine.params = params

    def hear(self, sound: Sound, over: str = "refuse") -> list[jax.Array]:
        """A spoken turn -> speech features [300, D] of every 30 s of it. Raises ValueError for bad audio.

        over: what becomes of a turn over 30 s: "refuse" it, "truncate" it, or "split" it into several clips.
        """
        if isinstance(sound, str | Path):
            clips = recordings.load_turn(sound, over)
        else:
            samples = recordings.check(np.asarray(sound, np.float32), "the samples given")
            clips = recordings.fit(samples, over)
        padded, _ = recordings.pad(clips, recordings.TURN_SAMPLES)
        return [self._hear(self.params, clip[None]) for clip in padded]

    def voice(self, name: str | None) -> jax.Array | None:
        """The x-vector of a voice by name or prompt file (None: the first stored one); None without a decoder."""
        if self.config.flow and name not in self.voices:
            self.voices[name] = jnp.asarray(voices.resolve(self.directory, self.config, name))
        return self.voices.get(name)

    def request(self, options: Options) -> Request:
        """Options as what a slot is told, generation_config.json filling in what they leave open."""
        given = lambda value, name, off: next(
            v for v in (value, self.defaults.get(name), off) if v is not None
        )  # noqa: E731
        text = Sampling.of(
            1,
            options.temperature,
            given(options.top_p, "top_p", 1.0),
            given(options.top_k, "top_k", 0),
            given(options.repetition_penalty, "repetition_penalty", 1.0),
        )
        unit = Sampling.of(1, options.unit_temperature, top_k=options.unit_top_k)
        return read_write.request(
            self.config,
            1,
            text,
            unit,
            max_text=options.max_new_tokens,
            max_flush=options.max_flush_units,
            seed=options.seed,
        )

    def engine(self, options: Options, prompt: int, slots: int = 1) -> Engine:
        """The engine for prompts of up to `prompt` positions; one per shape, so that answers alike compile once."""
        units, speech = longest_answer(self.config, options.max_new_tokens, options.max_flush_units)
        engine_config = EngineConfig(
            slots=slots,
            prefill_size=self.tokenizer.positions + TEMPLATE,
            llm_capacity=rounded(prompt + options.max_new_tokens),
            speech_capacity=rounded(speech),
            max_units=rounded(units),
            flow_chunk=options.chunk,
            flow_left_chunks=options.left_chunks,
            units_only=options.unit_vocabulary == "units",
        )
        if engine_config not in self.engines:
            self.engines[engine_config] = Engine(
                self.config, self.graph, self.params, engine_config
            )
        return self.engines[engine_config]

    def session(
        self,
        voice: str | None = None,
        options: Options | None = None,
        overflow: str = "error",
        turns: int | None = None,
        clips: int | None = None,
    ) -> Session:
        """A conversation of its own. overflow: see `Session`.

        turns, clips: how many turns it will have at most, and clips of 30 s in them, if that is known: the cache is made for these,
        otherwise for the longest conversation that the checkpoint allows.
        """
        options = options or Options()
        positions = self.config.max_prompt
        if turns:
            positions = min(
                positions,
                (clips or turns) * self.tokenizer.positions
                + turns * (TEMPLATE + options.max_new_tokens),
            )
        hear = functools.partial(self.hear, over=options.long)
        engine = self.engine(options, positions)
        return Session(
            hear, engine, self.tokenizer, self.request(options), self.voice(voice), overflow
        )

    def answer(
        self,
        conversation: Sound | Sequence,
        voice: str | None = None,
        options: Options | None = None,
    ) -> Answer:
        """Answer a spoken question, or the last turn of a conversation: sounds at even places (the user), texts at odd ones."""
        return join(self.stream(conversation, voice, options), self.config.flow is not None)

    def stream(
        self,
        conversation: Sound | Sequence,
        voice: str | None = None,
        options: Options | None = None,
    ) -> Iterator[Reply]:
        """The same answer as it is made."""
        (stream,) = self.streams([conversation], voice, options)
        return stream

    def streams(
        self,
        conversations: Sequence,
        voice: str | None = None,
        options: Options | None = None,
        slots: int | None = None,
    ) -> list[Iterator[Reply]]:
        """Answers to many conversations at once, in so many slots (default: one for each); exhausting one of them drives them all."""
        options = options or Options()
        x_vector, asked, prompts = self.voice(voice), self.request(options), []
        for conversation in conversations:
            turns = (
                [conversation]
                if isinstance(conversation, str | Path | np.ndarray)
                else list(conversation)
            )
            if len(turns) % 2 == 0:
                raise ValueError(
                    f"a conversation of {len(turns)} turns does not end with the user's"
                )
            heard = [
                self.hear(turn, options.long) if i % 2 == 0 else turn
                for i, turn in enumerate(turns)
            ]
            ids = self.tokenizer.prompt(
                [turn if isinstance(turn, str) else len(turn) for turn in heard]
            )
            if len(ids) > self.config.max_prompt:
                raise ValueError(
                    f"the conversation takes {len(ids)} positions, at most {self.config.max_prompt} fit; leave out old turns"
                )
            prompts.append((ids, [clip for turn in heard[::2] for clip in turn]))
        engine = self.engine(options, max(len(ids) for ids, _ in prompts), slots or len(prompts))
        queued = [
            engine.submit(split(ids, features, engine.engine_config.prefill_size), asked, x_vector)
            for ids, features in prompts
        ]
        return [replies(stream, self.tokenizer, []) for stream in queued]


def join(replies: Iterator[Reply], spoken: bool) -> Answer:
    """All of an answer at once."""
    parts = list(replies)
    return Answer(
        "".join(part.text for part in parts),
        [unit for part in parts for unit in part.units],
        "".join(part.unit_text for part in parts),
        np.concatenate([part.samples for part in parts]) if spoken else None,
    )


def generation_defaults(path: Path) -> dict:
    """What a release says about sampling; nothing if it says nothing."""
    try:
        defaults = json.loads(path.read_text()) if path.exists() else {}
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(defaults, dict):
        raise ValueError(f"{path} holds no settings")
    return defaults


def rounded(size: int) -> int:
    return -(-size // BUCKET) * BUCKET

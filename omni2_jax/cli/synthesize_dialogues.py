"""`omni2 synthesize dialogues`: dialogues as text, from a grammar or by a chat model."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from omni2_jax.cli.no_effect import refuse
from omni2_jax.cli.paths import local_file
from omni2_jax.cli.where import RayOption, ShardOption, WorkersOption

# Parameters for what a chat model says.
FOR_MODELS = (
    *("key_variable", "timeout", "mean_turns", "temperature", "question_words", "reply_words"),
    *("numbers_as_words", "attempts"),
)


def dialogues(
    context: typer.Context,
    out: Annotated[
        Path | None,
        typer.Option(
            parser=local_file, help="The .jsonl file to write; with --sentences, a text file."
        ),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Dialogues to make; of seeds, the first ones. With --sentences, sentences.",
            show_default="all seeds",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**31 - 1, help="Another seed, other dialogues.")
    ] = 0,
    max_turns: Annotated[
        int | None,
        typer.Option(min=1, max=20, help="The longest dialogues.", show_default="the grammar's, 5"),
    ] = None,
    grammar: Annotated[
        Path | None,
        typer.Option(help="A grammar file in YAML, such as recipes/nano/grammar.yaml."),
    ] = None,
    held_out: Annotated[
        int,
        typer.Option(
            min=0,
            help="With --grammar: dialogues to evaluate on, so many of unseen phrasings, of unseen "
            "values and of both.",
        ),
    ] = 0,
    sentences: Annotated[
        Literal["questions", "replies", "both"] | None,
        typer.Option(
            help="With --grammar: write distinct sentences instead, one a line, to --out or stdout."
        ),
    ] = None,
    seeds: Annotated[
        list[Path] | None,
        typer.Option(
            help="Instructions to begin dialogues with: Alpaca's JSON, UltraChat's JSONL, "
            "InstructS2S's JSON, or a .txt file with one a line. May be repeated."
        ),
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="With --seeds: an OpenAI-compatible server, such as http://localhost:8000/v1.",
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="The chat model's name there.")] = None,
    key_variable: Annotated[
        str, typer.Option(metavar="NAME", help="The environment variable that holds the key.")
    ] = "OPENAI_API_KEY",
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for one answer.")] = 120,
    mean_turns: Annotated[
        float,
        typer.Option(
            min=0, max=20, help="The number of turns is Poisson's, from 1 to --max-turns."
        ),
    ] = 2,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="Of the chat model.")] = 0.8,
    question_words: Annotated[
        int, typer.Option(min=1, max=1000, help="The longest questions, in words.")
    ] = 60,
    reply_words: Annotated[
        int, typer.Option(min=1, max=1000, help="The longest replies, in words.")
    ] = 100,
    numbers_as_words: Annotated[
        bool, typer.Option("--numbers-as-words", help="No digits in questions and replies.")
    ] = False,
    attempts: Annotated[
        int,
        typer.Option(
            min=1, max=20, help="How often a text is asked for, until it is fit to be spoken."
        ),
    ] = 3,
    workers: WorkersOption = None,
    ray: RayOption = None,
    shard: ShardOption = None,
) -> None:
    """Make dialogues as text, from --grammar or from --seeds: the input of `omni2 synthesize
    speech`.

    A grammar needs no model. All its dialogues are distinct, and the same command makes the same
    file. With --seeds, a chat model says each instruction anew for speech, and writes turn after
    turn. A command that was killed goes on where it stopped, and pays for no answer twice; its work
    is kept in OUT.work.
    """
    if (grammar is None) == (seeds is None):
        raise typer.BadParameter("give either --grammar or --seeds")
    if sentences is None and out is None:
        raise typer.BadParameter("give the file to write with --out")
    if grammar is not None:
        from omni2_jax.synthesize import make_dialogues

        if endpoint or model:
            raise typer.BadParameter("--endpoint and --model are for --seeds; a grammar needs none")
        refuse(context, FOR_MODELS, "for --seeds only, not with --grammar")
        if workers or ray or shard:
            raise typer.BadParameter(
                "--workers, --ray and --shard are for --seeds; a grammar's file is written at once"
            )
        if count is None:
            raise typer.BadParameter("say with --count how many dialogues the grammar is to make")
        if sentences is not None:
            refuse(context, ["held_out"], "for dialogues only, not with --sentences")
            make_dialogues.write_sentences(grammar, sentences, count, max_turns, seed, out)
        elif out is not None:
            make_dialogues.from_grammar(grammar, count, held_out, max_turns, seed, out)
    elif seeds is not None and out is not None:
        from omni2_jax.endpoints import Endpoint
        from omni2_jax.jobs import Where
        from omni2_jax.synthesize.dialogue_writer import WriterSettings
        from omni2_jax.synthesize.from_seeds import from_seeds

        if endpoint is None or model is None:
            raise typer.BadParameter("--seeds needs --endpoint and --model")
        if held_out or sentences:
            raise typer.BadParameter("--held-out and --sentences are for --grammar")
        settings = WriterSettings(
            mean_turns=mean_turns,
            max_turns=max_turns or 5,
            question_words=question_words,
            reply_words=reply_words,
            numbers_as_words=numbers_as_words,
            attempts=attempts,
            temperature=temperature,
            seed=seed,
        )
        server = Endpoint(endpoint, model, key_variable, timeout)
        from_seeds(seeds, count, server, settings, Where(workers, ray, shard), out)

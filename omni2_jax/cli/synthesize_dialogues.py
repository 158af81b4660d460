"""`omni2 synthesize dialogues`: dialogues as text, from a grammar."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def dialogues(
    grammar: Annotated[
        Path,
        typer.Option(help="A grammar file in YAML, such as recipes/nano/grammar.yaml."),
    ],
    count: Annotated[
        int, typer.Option(min=1, help="Dialogues to train on; with --sentences, sentences.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="The .jsonl file to write; with --sentences, a text file.")
    ] = None,
    held_out: Annotated[
        int,
        typer.Option(
            min=0,
            help="Dialogues to evaluate on: so many of unseen phrasings, of unseen values and of "
            "both.",
        ),
    ] = 0,
    max_turns: Annotated[
        int | None, typer.Option(min=1, help="Leave out longer dialogues. [default: none]")
    ] = None,
    sentences: Annotated[
        Literal["questions", "replies", "both"] | None,
        typer.Option(help="Write distinct sentences instead, one a line, to --out or stdout."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, other dialogues.")] = 0,
) -> None:
    """Make dialogues as text: the input of `omni2 synthesize speech`.

    All dialogues are distinct. The same command makes the same file.
    """
    from omni2_jax.synthesize import make_dialogues

    if sentences is not None:
        make_dialogues.write_sentences(grammar, sentences, count, max_turns, seed, out)
    elif out is None:
        raise typer.BadParameter("give the file to write with --out")
    else:
        make_dialogues.from_grammar(grammar, count, held_out, max_turns, seed, out)

"""Options that would do nothing are refused: their user expects them to do something."""

from collections.abc import Collection

import typer


def refuse(context: typer.Context, names: Collection[str], because: str) -> None:
    """Raise BadParameter if some options were given on the command line.

    names: of the command's parameters. because: follows their names in the message.
    """
    given = [
        "/".join([*option.opts, *option.secondary_opts])
        for option in context.command.params
        if option.name in names and is_given(context, option.name)
    ]
    if given:
        raise typer.BadParameter(f"{', '.join(given)}: {because}")


def is_given(context: typer.Context, name: str) -> bool:
    """Whether an option was given, be it with its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"

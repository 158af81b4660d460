"""`omni2 synthesize`: makes dialogues and their speech to train on."""

from omni2_jax import console
from omni2_jax.cli.synthesize_dialogues import dialogues
from omni2_jax.cli.synthesize_speech import speech

app = console.new_app()
app.command()(dialogues)
app.command()(speech)


@app.callback()
def synthesize() -> None:
    """Make dialogues, and speak them, to train on."""

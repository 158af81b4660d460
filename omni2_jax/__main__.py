"""`python -m omni2_jax` is the `omni2` command."""

from omni2_jax.cli.main import main

main()

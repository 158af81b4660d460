"""`python -m convert`, from a checkout, is `omni2 convert`."""

from omni2_jax.cli.main import main

main("convert")

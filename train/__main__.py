"""`python -m train`, from a checkout, is `omni2 train`."""

from omni2_jax.cli.main import main

main("train")

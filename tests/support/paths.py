"""Where the files lie that the tests read."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
GOLDENS = ROOT / "tests" / "goldens"
AUDIO = GOLDENS / "audio"
DECODER = GOLDENS / "cosy2_decoder"

#!/usr/bin/env bash
# The whole path at toy size: convert, prepare, train, answer. On a CPU it takes a few minutes,
# most of which is compilation. The weights are random, so the answer is noise.
#
#   pip install -e '.[convert,train]'          # in the root of the checkout
#   bash recipes/tiny.sh [DIRECTORY]           # default: ./tiny-recipe
#
# A step whose result exists is left out, and a run that was cut off is resumed: after an
# interruption start the script again.
set -euo pipefail

repository=$(cd "$(dirname "$0")/.." && pwd)
work=${1:-tiny-recipe}
mkdir -p "$work"
cd "$work"

# 1. Convert the released file formats into a checkpoint, with one voice.
[ -e start ] || omni2 convert \
    --omni2 "$repository/tests/goldens/omni2" \
    --decoder "$repository/tests/goldens/cosy2_decoder" \
    --voice "espeak=$repository/examples/voice.wav" \
    --out start
omni2 info start

# 2. Make a data set of four spoken dialogues.
[ -e dialogues ] || omni2 prepare --source "$repository/examples/training" --out dialogues

# 3. Train stage 1a, speech to text, for a few steps.
[ -e run/final ] || omni2 train --config stage1a \
    --set checkpoint=start --set data=dialogues \
    --set batch=4 --set steps=10 --set save_every=5 \
    --set optimizer.peak=3e-3 --set dtype=float32 --set workers=1 \
    --out run

# 4. Ask the trained model a question; its answer is a text and a 24 kHz wav.
omni2 chat --checkpoint run/final "$repository/examples/question.wav" \
    --max-new-tokens 40 --max-flush-units 100 --out answer.wav
echo "the answer is in $work/answer.wav"

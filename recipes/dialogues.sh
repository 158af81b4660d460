#!/usr/bin/env bash
# The paper's data recipe and its evaluation at toy size: dialogues from a grammar, spoken by two
# engines, prepared, trained on for a minute, and measured on what was held out. The toy has random
# weights to start from and sees too little to answer well; the same commands with real parts are in
# the README. On two CPU cores it takes about ten minutes.
#
#   pip install -e '.[convert,train,synthesize,evaluate]'     # in the root of the checkout
#   apt-get install espeak-ng flite            # two programs that speak
#   bash recipes/dialogues.sh [DIRECTORY]      # default: ./dialogues-recipe
#   OMNI2_WHISPER=Systran/faster-whisper-tiny.en bash recipes/dialogues.sh     # measures the spoken answers, too
#
# A step whose result exists is left out, and every command goes on where it was cut off.
set -euo pipefail

repository=$(cd "$(dirname "$0")/.." && pwd)
work=${1:-dialogues-recipe}
mkdir -p "$work"
cd "$work"

# 1. 200 dialogues from a grammar, and 20 of each kind that is held out.
[ -e dialogues.jsonl ] || omni2 synthesize dialogues \
    --grammar "$repository/recipes/nano/grammar.yaml" --count 200 --held-out 20 --max-turns 2 \
    --out dialogues.jsonl

# 2. Speak them: questions by many voices of espeak-ng and flite, replies by one.
[ -e speech/train.jsonl ] || omni2 synthesize speech \
    --dialogues dialogues.jsonl --voices "$repository/recipes/espeak_flite.yaml" --out speech

# 3. A checkpoint at toy size, and a speech tokenizer, which turns the replies into units.
[ -e start ] || omni2 convert \
    --omni2 "$repository/tests/goldens/omni2" \
    --decoder "$repository/tests/goldens/cosy2_decoder" \
    --voice "espeak=$repository/examples/voice.wav" \
    --out start
cat > tokenizer.py <<'CONFIG'
from omni2_jax.config import Omni2Config, SpeechTokenizerConfig

speech_tokenizer = SpeechTokenizerConfig(width=64, layers=1, heads=2)
config = Omni2Config(units=speech_tokenizer.units).only()
CONFIG
[ -e tokenizer ] || omni2 new --config tokenizer.py --parts speech_tokenizer --out tokenizer
for part in train test; do
    [ -e "$part" ] || omni2 prepare --source "speech/$part.jsonl" --speech-tokenizer tokenizer \
        --out "$part"
done

# 4. Train stage 1a, speech to text, for about a minute.
[ -e run/final ] || omni2 train --config stage1a \
    --set checkpoint=start --set data=train --set validation=test \
    --set batch=8 --set steps=40 --set save_every=20 --set validate_every=20 \
    --set optimizer.peak=3e-3 --set dtype=float32 --set workers=1 --out run

# 5. Measure it on the held-out dialogues, and show the result.
spoken=()
[ -z "${OMNI2_WHISPER:-}" ] || spoken=(--task asr-wer --recogniser "$OMNI2_WHISPER")
omni2 evaluate --task spoken-qa --task naturalness "${spoken[@]}" --system run/final \
    --data speech/test.jsonl --limit 40 --option max_new_tokens=24 --option max_flush_units=50 \
    --label toy --out evaluation
omni2 evaluate report evaluation --out report
echo "the report is in $work/report/report.md"

#!/usr/bin/env bash
# A voice from nothing: speech tokenizer, flow and vocoder of one voice, learnt from sentences that
# another program speaks. Nothing released is needed. On two CPU cores it takes about a day; a part
# that has learnt for an hour speaks already.
#
#   pip install -e '.[train,synthesize,evaluate]'     # in the root of the checkout
#   pip install piper-tts                    # a separate program; any other that writes wavs will do
#   export PIPER_VOICE=.../en_US-joe-medium.onnx             # the voice to learn; joe's is CC0
#   export OMNI2_WHISPER=Systran/faster-whisper-tiny.en  # or its directory: the recogniser
#   bash recipes/voice.sh [DIRECTORY]        # default: ./voice-recipe
#
# A step whose result exists is left out, and every command goes on where it was cut off: after an
# interruption start the script again. SMALL=1 makes everything tiny, to try the commands.
set -euo pipefail
. "$(dirname "$0")/environment.sh"

work=${1:-voice-recipe}
mkdir -p "$work"
cd "$work"

# Sentences of replies and of questions, held-out ones; settings of training.
replies=13000 questions=760 held_out=60 small=()
if [ -n "${SMALL:-}" ]; then
    replies=24 questions=8 held_out=4
    small=(--set steps=4 --set batch=2)
fi

# 1. Sentences: replies and questions of a grammar, nine hours of speech, which piper speaks in about
# one hour. With 40 minutes of speech the flow stops improving early.
grammar=$repository/recipes/nano/grammar.yaml
[ -e replies.txt ] || omni2 synthesize dialogues --grammar "$grammar" \
    --sentences replies --count $replies --out replies.txt
[ -e questions.txt ] || omni2 synthesize dialogues --grammar "$grammar" \
    --sentences questions --count $questions --out questions.txt
shuf --random-source=<(yes) replies.txt > shuffled.txt
head -n $held_out shuffled.txt > test.txt
tail -n +$((held_out + 1)) shuffled.txt | cat - questions.txt > train.txt

# 2. Speak them, and make data sets of the recordings.
for part in train test; do
    [ -e speech-$part/metadata.jsonl ] || omni2 synthesize speech \
        --dialogues $part.txt --voices "$repository/recipes/nano/voices.yaml" --out speech-$part
    [ -e recordings-$part ] || omni2 prepare --source speech-$part --out recordings-$part
done

# 3. Fresh parameters; the speech tokenizer, and the units of all recordings.
[ -e start ] || omni2 new --config voice --out start
[ -e runs/units/final ] || omni2 train --config voice_units --set checkpoint=start \
    --set data=recordings-train --set validation=recordings-test "${small[@]}" --out runs/units
for part in train test; do
    [ -e units-$part ] || omni2 prepare --source speech-$part --speech-tokenizer runs/units/final \
        --out units-$part
done

# 4. The vocoder (mel frames to samples), then the flow (units to mel frames).
[ -e runs/vocoder/final ] || omni2 train --config voice_vocoder --set checkpoint=runs/units/final \
    --set data=units-train --set validation=units-test \
    "${small[@]}" ${SMALL:+--set vocoder.f0_steps=1} --out runs/vocoder
[ -e runs/flow/final ] || omni2 train --config voice_flow --set checkpoint=runs/vocoder/final \
    --set data=units-train --set validation=units-test \
    "${small[@]}" ${SMALL:+--set mu_steps=2} --out runs/flow

# 5. What each part keeps of held-out recordings.
omni2 evaluate --task copy-synthesis --system runs/flow/final --data speech-test/metadata.jsonl \
    --recogniser "${OMNI2_WHISPER:?}" --out copies
omni2 evaluate report copies --run runs/units --run runs/vocoder --run runs/flow --out report
echo "the report is in $work/report/report.md"

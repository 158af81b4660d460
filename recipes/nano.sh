#!/usr/bin/env bash
# Nano, a little model that hears a question and answers it aloud, from nothing but Whisper tiny.en,
# programs that speak, and the grammar recipes/nano. recipes/nano/README.md says what it knows.
# omni2_jax/nano/README.md says how the model in the package was made; this script as a whole has
# not been run to those figures.
#
#   pip install -e '.[convert,train,synthesize,evaluate]'     # in the root of the checkout
#   apt-get install espeak-ng flite
#   pip install piper-tts                    # a separate program, which speaks the replies
#   export PIPER_VOICE=.../en_US-joe-medium.onnx             # joe's voice is CC0
#   export OMNI2_WHISPER=Systran/faster-whisper-tiny.en  # or its directory: the encoder, and the recogniser
#   export VOICE=.../voice-recipe/runs/flow/final   # its decoder; default: the voice in examples/joe
#   bash recipes/nano.sh [DIRECTORY]         # default: ./nano-recipe
#
# A step whose result exists is left out, and every command goes on where it was cut off: after an
# interruption start the script again. SMALL=1 makes everything tiny, to try the commands.
set -euo pipefail
. "$(dirname "$0")/environment.sh"

voice=${VOICE:-$repository/examples/joe/checkpoint}   # its units, and the decoder that speaks them
work=${1:-nano-recipe}
mkdir -p "$work"
cd "$work"
grammar=$repository/recipes/nano/grammar.yaml
voices=$repository/recipes/nano/voices.yaml

# Dialogues as text, spoken ones, those of them with spoken replies, sentences; settings of training.
texts=120000 held_out=800 spoken=13000 whole=2000 sentences=13000 small=()
if [ -n "${SMALL:-}" ]; then
    texts=3000 held_out=8 spoken=40 whole=40 sentences=12
    small=(--set steps=2 --set batch=2)
fi

# 1. What it knows, as text; a tokenizer and fresh parameters; the LLM learns the text.
[ -e texts.jsonl ] || omni2 synthesize dialogues --grammar "$grammar" \
    --count $texts --held-out $held_out --seed 1 --out texts.jsonl
[ -e start ] || omni2 new --config nano --whisper "$OMNI2_WHISPER" --text texts.jsonl --out start
[ -e text/final ] || omni2 train --config nano_text --set checkpoint=start \
    --set data=texts.jsonl --set validation=texts.jsonl "${small[@]}" --out text

# 2. Questions in 140 voices, and others held out; the speech encoder's frames of them.
[ -e spoken.jsonl ] || omni2 synthesize dialogues --grammar "$grammar" \
    --count $spoken --held-out $((spoken / 50)) --max-turns 2 --seed 2 --out spoken.jsonl
[ -e questions/test.jsonl ] || omni2 synthesize speech --dialogues spoken.jsonl \
    --voices "$voices" --no-replies --validation 0.1 --test 0.1 --out questions
for part in train validation; do
    [ -e heard-$part ] || omni2 prepare --source questions/$part.jsonl --out heard-$part
done
heard=(--set data=heard-train --set validation=heard-validation)
[ -e frames ] || omni2 frames --config nano_1a --set checkpoint=text/final "${heard[@]}" --out frames

# 3. It learns to hear.
[ -e 1a/final ] || omni2 train --config nano_1a --set checkpoint=text/final "${heard[@]}" \
    --set frames=frames --set replay_data=texts.jsonl "${small[@]}" --out 1a
for noise in "" 20 10; do   # dB
    omni2 evaluate --task text-qa --text-only --system 1a/final --data questions/test.jsonl \
        --every-turn ${noise:+--noise $noise} --by split+voices --by split+topic \
        --label "nano, text" --out "evaluation-text$noise"
done

# 4. Replies in its voice, as units; it learns to speak them, first alone, then in dialogues.
[ -e replies.txt ] || omni2 synthesize dialogues --grammar "$grammar" \
    --sentences replies --count $sentences --out replies.txt
[ -e replies/metadata.jsonl ] || omni2 synthesize speech --dialogues replies.txt \
    --voices "$voices" --out replies
[ -e read ] || omni2 prepare --source replies --speech-tokenizer "$voice" --out read
[ -e 1b/final ] || omni2 train --config nano_1b --set checkpoint=1a/final --set data=read \
    "${small[@]}" --out 1b
[ -e whole.jsonl ] || omni2 synthesize dialogues --grammar "$grammar" \
    --count $whole --held-out $((whole / 20)) --max-turns 2 --seed 3 --out whole.jsonl
[ -e speech/test.jsonl ] || omni2 synthesize speech --dialogues whole.jsonl --voices "$voices" \
    --validation 0.1 --test 0.1 --out speech
for part in train validation; do
    [ -e talk-$part ] || omni2 prepare --source speech/$part.jsonl \
        --speech-tokenizer "$voice" --out talk-$part
done
talk=(--set data=talk-train --set validation=talk-validation)
[ -e hidden ] || omni2 hidden --config nano_2 --set checkpoint=1b/final "${talk[@]}" --out hidden
[ -e 2/final ] || omni2 train --config nano_2 --set checkpoint=1b/final "${talk[@]}" \
    --set hidden=hidden "${small[@]}" --out 2

# 5. With the decoder of the voice it is whole, and is measured on what it has not heard.
[ -e nano ] || omni2 join 2/final "decoder=$voice" --dtype bfloat16 --quantize int8 --out nano
echo '{"unit_temperature": 0.5}' > nano/generation_config.json   # it is less clear with 1
omni2 evaluate --task spoken-qa --task asr-wer --task naturalness --system nano \
    --recogniser "$OMNI2_WHISPER" --data questions/test.jsonl --by split+voices --label nano \
    --out evaluation
omni2 evaluate --task latency --system nano --data questions/test.jsonl --limit 50 --label nano \
    --out evaluation-latency
omni2 evaluate report evaluation* --run text --run 1a --run 1b --run 2 --out report
echo "the report is in $work/report/report.md"

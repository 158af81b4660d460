#!/usr/bin/env bash
# A voice of your own: fine-tune the flow on recordings of one speaker, then answer in that voice.
#
#   pip install -e '.[convert,train,cuda]'       # in the root of the checkout
#   CHECKPOINT=omni2-7b RECORDINGS=recordings PROMPT=recordings/0001.wav bash recipes/fine_tune_voice.sh
#
#   CHECKPOINT  has a decoder; `omni2 convert` makes it
#   RECORDINGS  a folder of wavs and metadata.jsonl, one recording a line:
#               {"audio": "0001.wav", "text": "what is said"}
#   PROMPT      a few seconds of the speaker, for the voice's x-vector
#   SPEECH_TOKENIZER  turns the recordings into units: a Hugging Face id, or the path of
#               speech_tokenizer_v2.onnx; default: that of CosyVoice2-0.5B, as released models need
#
# A step whose result exists is left out, and a run that was cut off is resumed: after an
# interruption start the script again. One GPU is enough.
set -euo pipefail

repository=$(cd "$(dirname "$0")/.." && pwd)
checkpoint=${CHECKPOINT:-omni2-7b}
recordings=${RECORDINGS:-recordings}
tokenizer=${SPEECH_TOKENIZER:-FunAudioLLM/CosyVoice2-0.5B}
prompt=${PROMPT:-$recordings/0001.wav}
work=${WORK:-fine-tuned-voice}
mkdir -p "$work"

# 1. The speech tokenizer, and the recordings' units with it.
[ -e "$work/tokenizer" ] ||
    omni2 convert --speech-tokenizer "$tokenizer" --out "$work/tokenizer"
[ -e "$work/dialogues" ] ||
    omni2 prepare --source "$recordings" --speech-tokenizer "$work/tokenizer" \
        --out "$work/dialogues"

# 2. Fine-tune the flow; the speaker encoder and everything else stay as they are.
[ -e "$work/run/final" ] ||
    omni2 train --config flow \
        --set checkpoint="$checkpoint" --set data="$work/dialogues" --out "$work/run"

# 3. Answer a question in that voice.
omni2 chat --checkpoint "$work/run/final" --voice "$prompt" \
    "${QUESTION:-$repository/examples/question.wav}" --out "$work/answer.wav"
echo "the answer is in $work/answer.wav"

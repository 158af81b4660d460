#!/usr/bin/env bash
# A voice of your own: fine-tune the flow on recordings of one speaker, then answer in that voice.
#
#   recordings/data.jsonl   one dialogue a line; the assistant's turns are the speaker's recordings:
#     {"id": "0001", "turns": [{"role": "user", "text": "-"},
#                              {"role": "assistant", "text": "what is said", "audio": "0001.wav"}]}
#   omni2-7b                a checkpoint with a decoder, made by `omni2 convert`
#   speech_tokenizer_v2.onnx  of CosyVoice2-0.5B; it turns the recordings into units
#
# A step whose result exists is left out, and a run that was cut off is resumed: after an
# interruption start the script again. One GPU is enough.
set -euo pipefail

checkpoint=${CHECKPOINT:-omni2-7b}
recordings=${RECORDINGS:-recordings}
tokenizer=${SPEECH_TOKENIZER:-speech_tokenizer_v2.onnx}
prompt=${PROMPT:-recordings/0001.wav} # a few seconds of the speaker: the voice's x-vector
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
    "${QUESTION:-examples/question.wav}" --out "$work/answer.wav"
echo "the answer is in $work/answer.wav"

#!/usr/bin/env bash
# The paper's LLaMA-Omni2-7B: from the published starting points to a model to talk to.
#
#   pip install -e '.[convert,train,cuda]'    # in the root of the checkout; on a TPU: tpu instead of cuda
#   bash recipes/reproduce_7b.sh
#
# Settings (batch, rates, epochs) are those of the paper, section 4.1, in configs/stage*.py. A step
# whose result exists is left out, and a run that was cut off is resumed, so the script can be
# started again after any interruption. Stage 1a is the largest: about 16 bytes for each of 7.6
# billion parameters (weight, two moments, gradient, in float32), divided over the fsdp axis, plus
# activations (benchmarks/AOT.md).
#
# Several processes: convert and prepare once, on one of them, then start each training command in
# all processes, with a directory that all of them see (or, on TPU pods without one, a bucket):
#   SLURM:  LAUNCH="srun --nodes=4 --ntasks-per-node=1" FLAGS="--distributed" bash recipes/reproduce_7b.sh
#   TPU:    gcloud compute tpus tpu-vm ssh NAME --worker=all \
#             --command "omni2 train --distributed --config stage1a --set checkpoint=... --out ..."
set -euo pipefail

repository=$(cd "$(dirname "$0")/.." && pwd)
work=${WORK:-runs-7b}
# Multi-turn spoken dialogues (the paper, section 3): the file of ICTNLP/InstructS2S-200K, with its
# archives unpacked beside it.
dialogues_json=${DIALOGUES:-instruct_en_200k_data_cosy2.json}
launch=${LAUNCH:-}
flags=${FLAGS:-}
mkdir -p "$work"

# 1. The checkpoint that training starts from: Whisper-large-v3's encoder, Qwen2.5-7B-Instruct,
#    Qwen2.5-0.5B as the speech LM with new rows for the units, and CosyVoice2's decoder.
[ -e "$work/start" ] || omni2 convert \
    --whisper openai/whisper-large-v3 \
    --llm Qwen/Qwen2.5-7B-Instruct \
    --speech-lm Qwen/Qwen2.5-0.5B \
    --decoder ICTNLP/cosy2_decoder \
    --out "$work/start"

# 2. The speech tokenizer (speech_tokenizer_v2.onnx), for replies that are recordings without units.
[ -e "$work/tokenizer" ] || omni2 convert \
    --speech-tokenizer FunAudioLLM/CosyVoice2-0.5B \
    --out "$work/tokenizer"

# 3. The data set.
[ -e "$work/dialogues" ] || omni2 prepare \
    --source "$dialogues_json" --speech-tokenizer "$work/tokenizer" --out "$work/dialogues"

# 4. Stage 1a, speech to text: 3 epochs of the adapter and the LLM.
[ -e "$work/1a/final" ] || $launch omni2 train $flags --config stage1a \
    --set checkpoint="$work/start" --set data="$work/dialogues" --set mesh.fsdp=-1 \
    --out "$work/1a"

# 5. Stage 1b, text to speech: 5 epochs of the speech LM.
[ -e "$work/1b/final" ] || $launch omni2 train $flags --config stage1b \
    --set checkpoint="$work/1a/final" --set data="$work/dialogues" --set mesh.fsdp=-1 \
    --out "$work/1b"

# 6. Stage 2, speech to speech: 1 epoch of gate fusion and the speech LM. The LLM is frozen, so its
#    hidden states could also be computed once, by `omni2 hidden`, and read with --set hidden=...
[ -e "$work/2/final" ] || $launch omni2 train $flags --config stage2 \
    --set checkpoint="$work/1b/final" --set data="$work/dialogues" --set mesh.fsdp=-1 \
    --out "$work/2"

# 7. Talk to it. The voice is any recording of a few seconds.
omni2 info "$work/2/final"
omni2 chat --checkpoint "$work/2/final" "${QUESTION:-$repository/examples/question.wav}" \
    --voice "${PROMPT:-$repository/examples/voice.wav}" --out "$work/answer.wav"
echo "the answer is in $work/answer.wav"

#!/usr/bin/env bash
# The paper's tables 2 to 5 repeated on Nano, the model that the package carries: gate fusion and
# what it is compared with; how the speech LM is trained before stage 2; R and W; the number of
# dialogues and of turns, of stage 2 alone.
#
#   the programs and the first two variables of recipes/nano.sh
#   bash recipes/nano_ablations.sh [DIRECTORY]         # default: ./nano-ablations
#
#   VOICE      a checkpoint with the speech tokenizer of Nano's units; default: examples/joe
#   LIMIT      how many held-out conversations each variant answers, 60
#   SEEDS      of table 2, "0 1 2"
#
# A step whose result exists is left out, and a run that was cut off is resumed: after an
# interruption start the script again.
set -euo pipefail
. "$(dirname "$0")/environment.sh"

voice=${VOICE:-$repository/examples/joe/checkpoint}
work=${1:-nano-ablations}
mkdir -p "$work"
cd "$work"
work=$PWD

# 1. Nano with weights that can be trained; and as it is before stage 1b, with a speech LM that
# starts as its LLM, as the paper's starts as Qwen2.5-0.5B.
[ -e nano ] || omni2 join "$repository/omni2_jax/nano" --dequantize --dtype float32 --out nano
[ -e heard ] || omni2 join nano --speech-lm-from-llm --out heard

# 2. Dialogues of at most two questions, spoken; the replies' units.
[ -e dialogues.jsonl ] || omni2 synthesize dialogues --grammar "$repository/recipes/nano/grammar.yaml" \
    --count 2400 --held-out 160 --max-turns 2 --seed 3 --out dialogues.jsonl
[ -e speech/test.jsonl ] || omni2 synthesize speech --dialogues dialogues.jsonl \
    --voices "$repository/recipes/nano/voices.yaml" --validation 0.05 --test 0.08 --out speech
[ -e validation ] || omni2 prepare --source speech/validation.jsonl --speech-tokenizer "$voice" \
    --out validation

# 3. What all variants have in common: settings, what is measured, stage 1a, the hidden states.
export SOURCE=$work/speech/train.jsonl TOKENIZER=$voice
export CONFIGS="nano_1a nano_1b nano_2" HIDDEN=1 START=$work/heard
export SETTINGS="--set validation=$work/validation --set validate_every=132"
export SETTINGS_1B="--set batch=16 --set steps=1056"   # 5.8 epochs; the paper's has five
export SETTINGS_2="--set steps=264"                    # one epoch, as the paper's
measure="--recogniser ${OMNI2_WHISPER:?} --limit ${LIMIT:-60} --dataset held-out"
export MEASURE="--task spoken-qa --task asr-wer $measure"
export QUESTIONS=$work/speech/test.jsonl

# stages DIRECTORY NAME=CHECKPOINT...: the stages of a whole model that are not trained there.
stages() {
    local stage
    for stage in "${@:2}"; do
        mkdir -p "$1/${stage%%=*}"
        ln -sfn "${stage#*=}" "$1/${stage%%=*}/final"
    done
}

# 4. Table 2 from Nano's own stage 1b: 10,000 steps of 32 rows, of 12,710 different sentences.
stages fusion/full "1a=$work/heard" "1b=$work/nano"
TABLES=2 WORK=$work/fusion LABEL=nano SEEDS=${SEEDS:-0 1 2} bash "$repository/recipes/ablations.sh"

# 5. Table 4: R and W of its whole model, the paper's pairs.
for pair in 1-5 2-10 3-10 3-15 4-15 5-20; do
    [ -e fusion/evaluation/$pair ] || omni2 evaluate --system fusion/full/2/final \
        --data "$QUESTIONS" --label nano --task asr-wer --task latency $measure \
        --read ${pair%-*} --write ${pair#*-} --out fusion/evaluation/$pair
done

# 6. Table 3, every stage 1b equally short, and the offline line of table 4.
stages before/full "1a=$work/heard"
for name in data hidden; do
    [ -e before/full/$name ] || ln -s "../../fusion/full/$name" "before/full/$name"
done
TABLES="3 4" READ=3 WRITE=10 WORK=$work/before LABEL="nano, short 1b" \
    bash "$repository/recipes/ablations.sh"

# 7. Table 5, stage 2 alone: fewer dialogues, or the first turn of each, in one epoch. The first
# stages are Nano's, which have read all sentences.
stages amount/full "1a=$work/heard" "1b=$work/nano" "2=$work/fusion/full/2/final"
ln -sfn "../../fusion/full/data" amount/full/data
for name in share-75 share-50 share-25 single; do
    stages amount/$name "1a=$work/heard" "1b=$work/nano"
done
one_epoch="--set steps=none --set epochs=1 --set validate_every=33"
TABLES=5 WORK=$work/amount LABEL=nano SETTINGS_2=$one_epoch \
    bash "$repository/recipes/ablations.sh"

omni2 evaluate report fusion/evaluation before/evaluation amount/evaluation --out report
echo "the report is in $work/report/report.md"

#!/usr/bin/env bash
# The paper's ablations: train the variants of tables 2, 3 and 5, measure them, change R and W as in
# table 4, and write one report with the paper's rows beside the measured ones.
#
#   pip install -e '.[convert,train,evaluate,cuda]'      # in the root of the checkout; on a TPU: tpu
#   START=runs-7b/start SOURCE=spoken/data.jsonl TOKENIZER=runs-7b/tokenizer \
#       QUESTIONS="llama-questions.jsonl web-questions.jsonl" \
#       MEASURE="--task spoken-qa --task asr-wer --recogniser Systran/faster-whisper-large-v3 --device cuda" \
#       bash recipes/ablations.sh
#
#   START      checkpoint that training starts from (recipes/reproduce_7b.sh makes it)
#   SOURCE     dialogues: a .jsonl, one dialogue a line, as `omni2 prepare` reads it
#   TOKENIZER  checkpoint of the speech tokenizer; not needed where replies bring units
#   QUESTIONS  files of questions, see `omni2 evaluate --help`
#   MEASURE    options of `omni2 evaluate`: tasks, recogniser (asr-wer and S2S need one), judge
#   TABLES     which tables, "2 3 4 5"
#   SHARES     which smaller data sets of table 5, in per cent of the dialogues, "75 50 25"
#   READ WRITE R and W of table 4; every pair is measured
#   LABEL      what the models are called in the report, before the variant's name
#   SEEDS      of stage 2 in table 2, which is repeated with each, "0"
#   CONFIGS    settings of the stages 1a, 1b and 2, "stage1a stage1b stage2"
#   SETTINGS   options of every `omni2 train`, as "--set mesh.fsdp=-1"; SETTINGS_1A, SETTINGS_1B and
#              SETTINGS_2: of one stage
#   HIDDEN     1: compute the LLM's hidden states once for all runs of stage 2 (`omni2 hidden`)
#   LAUNCH FLAGS WORK   as in recipes/reproduce_7b.sh
#
# A run whose result exists is left out, and a run that was cut off is resumed: after an
# interruption start the script again. All variants share stages as far as they can: table 2 adds
# two runs of stage 2 to the whole model's three runs, table 3 four, table 4 one (two without table
# 3), table 5 three for each data set.
set -euo pipefail

start=${START:?the checkpoint that training starts from}
source=${SOURCE:?a .jsonl of spoken dialogues}
questions=${QUESTIONS:?files of questions to evaluate on}
measure=${MEASURE:?options of omni2 evaluate: tasks, and the recogniser that asr-wer needs}
tables=" ${TABLES:-2 3 4 5} "
shares=${SHARES:-75 50 25}
read=${READ:-1,2,3,4,5}
write=${WRITE:-5,10,15,20}
label=${LABEL:+$LABEL, }
seeds=(${SEEDS:-0})
configs=(${CONFIGS:-stage1a stage1b stage2})
settings=${SETTINGS:-}
settings_of=("${SETTINGS_1A:-}" "${SETTINGS_1B:-}" "${SETTINGS_2:-}")
hidden=${HIDDEN:-}
launch=${LAUNCH:-}
flags=${FLAGS:-}
work=${WORK:-ablations}
mkdir -p "$work"

# dialogues NAME PERCENT TURNS: a data set of the first PERCENT of the dialogues, cut to TURNS turns.
dialogues() {
    [ -e "$work/$1/data" ] && return
    mkdir -p "$work/$1"
    python3 - "$source" "$work/$1/dialogues.jsonl" "$2" "$3" <<'PYTHON'
import json, pathlib, sys

source, target = pathlib.Path(sys.argv[1]).absolute(), pathlib.Path(sys.argv[2])
percent, turns = float(sys.argv[3]), int(sys.argv[4])
lines = [line for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
with open(target, "w", encoding="utf-8") as file:
    for line in lines[: max(1, round(len(lines) * percent / 100))]:
        dialogue = json.loads(line)
        dialogue["turns"] = dialogue["turns"][:turns]
        for turn in dialogue["turns"]:
            if turn.get("audio"):
                turn["audio"] = str(source.parent / turn["audio"])
        file.write(json.dumps(dialogue, ensure_ascii=False) + "\n")
PYTHON
    omni2 prepare --source "$work/$1/dialogues.jsonl" --out "$work/$1/data" \
        ${TOKENIZER:+--speech-tokenizer "$TOKENIZER"}
}

# train STAGE OUT CHECKPOINT DATASET [SETTING...]: stage 0, 1 or 2, that is 1a, 1b or 2.
train() {
    local stage=$1 out=$2 checkpoint=$3 directory=$work/$4
    shift 4
    [ -e "$out/final" ] && return
    if [ "$stage" = 2 ] && [ -n "$hidden" ]; then
        # The LLM is frozen after stage 1a, so every run of stage 2 reads the same states.
        [ -e "$directory/hidden" ] || omni2 hidden --config "${configs[2]}" \
            --set checkpoint="$checkpoint" --set data="$directory/data" $settings \
            --out "$directory/hidden"
        set -- --set hidden="$directory/hidden" "$@"
    fi
    $launch omni2 train $flags --config "${configs[$stage]}" --set checkpoint="$checkpoint" \
        --set data="$directory/data" $settings ${settings_of[$stage]} "$@" --out "$out"
}

# whole NAME PERCENT TURNS: the three stages on a data set.
whole() {
    dialogues "$1" "$2" "$3"
    train 0 "$work/$1/1a" "$start" "$1"
    train 1 "$work/$1/1b" "$work/$1/1a/final" "$1"
    train 2 "$work/$1/2" "$work/$1/1b/final" "$1" --set seed="${seeds[0]}"
}

# evaluate NAME CHECKPOINT [OPTION...]: on every file of questions.
evaluate() {
    local name=$1 checkpoint=$2 file
    shift 2
    for file in $questions; do
        omni2 evaluate --system "$checkpoint" --data "$file" --label "$label$name" $measure "$@" \
            --out "$work/evaluation/$name/$(basename "${file%.*}")"
    done
}

chosen() { case $tables in *" $1 "*) return 0 ;; *) return 1 ;; esac }

# The whole model. It is the first row of tables 2, 3 and 5.
whole full 100 1000
full=$work/full
rows=()
chosen 2 && rows+=(--row table2/gate)
chosen 3 && rows+=(--row table3/streaming)
chosen 5 && rows+=(--row table5/200k-multi)
evaluate full "$full/2/final" "${rows[@]}"

# Table 2: what the speech LM is given of a text token.
if chosen 2; then
    for seed in "${seeds[@]}"; do
        for mix in gate sum hidden; do
            name=$mix
            if [ "$seed" != "${seeds[0]}" ]; then
                name=$mix-seed-$seed
            elif [ $mix = gate ]; then
                continue   # the whole model
            fi
            train 2 "$full/2-$name" "$full/1b/final" full --set mix=$mix --set seed="$seed"
            evaluate "$name" "$full/2-$name/final" --row table2/$mix
        done
    done
fi

# Table 3: how the speech LM is trained before stage 2.
if chosen 3; then
    train 1 "$full/1b-offline" "$full/1a/final" full --set layout=offline
    train 2 "$full/2-offline" "$full/1b-offline/final" full
    evaluate offline-tts "$full/2-offline/final" --row table3/offline
    train 2 "$full/2-text" "$full/1a/final" full
    evaluate text-only "$full/2-text/final" --row table3/text
    train 2 "$full/2-scratch" "$full/1a/final" full --set reset=speech_lm
    evaluate scratch "$full/2-scratch/final" --row table3/scratch
fi

# Table 4: R and W, changed when the model answers; and all text before all speech, which is trained.
if chosen 4; then
    evaluate read-write "$full/2/final" --read "$read" --write "$write" --task latency
    train 1 "$full/1b-offline" "$full/1a/final" full --set layout=offline
    train 2 "$full/2-all-offline" "$full/1b-offline/final" full --set layout=offline
    # One read of up to 256 text tokens, the longest answer, and then every unit.
    evaluate offline "$full/2-all-offline/final" --read 256 --write 10 --row table4/offline
fi

# Table 5: fewer dialogues, and one turn of each.
if chosen 5; then
    for share in $shares; do
        whole "share-$share" "$share" 1000
        evaluate "share-$share" "$work/share-$share/2/final" --row "table5/$((2 * share))k-multi"
    done
    whole single 100 2
    evaluate single "$work/single/2/final" --row table5/200k-single
fi

omni2 evaluate report "$work/evaluation" --out "$work/report"

#!/usr/bin/env bash
# Run the candidates for the best pruning of a model at 70 %, recover one, and print them beside published figures.
#
#   [VARIABLE=value ...] bash scripts/record.sh MODEL [flags of sweep.py and main.py, which win over those set here]
#
#   MODEL     hub id or folder: meta-llama/Llama-2-7b-hf, meta-llama/Meta-Llama-3-8B ...   SAVE     folder of the results
#   METHODS   "sparsegpt alps wanda_price alps_price"   SPARSITY   "0.7"   SEEDS   3        FORMAT   of the table, text
#   RECOVERED "alps_price", recovered with TOKENS "2000000" of C4; "" for none     DRY_RUN=1 prints the commands only
#
# Main.py's defaults are the published setting: C4, 128 windows of 2048 tokens, WikiText-2. What is complete is skipped.
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
case "${1:-}" in
    "" | -*) echo "record.sh: error: MODEL is missing; type: bash scripts/record.sh meta-llama/Llama-2-7b-hf" >&2; exit 2 ;;
esac
need requirements.txt

model="$1"; shift
save="${SAVE:-results/record/$(basename "$model")}"
runs=("$PYTHON_BIN" scripts/sweep.py --model "$model" --save "$save" --seeds "${SEEDS:-3}"
    --methods "${METHODS:-sparsegpt alps wanda_price alps_price}" --sparsities "${SPARSITY:-0.7}" "$@")
recovered="${RECOVERED-alps_price}"
recover=("${runs[@]}" --methods "$recovered" --recover "${TOKENS:-2000000}")
table=("$PYTHON_BIN" scripts/table.py "$save" --published --format "${FORMAT:-text}")

if [ -n "${DRY_RUN:-}" ]; then
    printf '%q ' "${runs[@]}"; echo
    if [ -n "$recovered" ]; then printf '%q ' "${recover[@]}"; echo; fi
    printf '%q ' "${table[@]}"; echo
    exit
fi
status=0
"${runs[@]}" || status=$?
if [ -n "$recovered" ] && [ "$status" -le 1 ]; then "${recover[@]}" || status=$?; fi
if [ "$status" -gt 1 ]; then exit "$status"; fi  # a wrong flag, or Ctrl-C
echo
"${table[@]}" || exit $?
exit "$status"

#!/usr/bin/env bash
# The paper's Table 2 on a real small model that comes as a package: dense and six methods at 0.5, 0.6 and 0.7.
#   [SPARSITY="0.5 0.6"] [METHODS="dense wanda wanda_ww"] [EPSILON="0.2 0.3"] [SAVE=DIR] [FORMAT=markdown] \
#       bash scripts/table2_smollm2.sh [flags of sweep.py and main.py, which win over those set here]
# What is complete is skipped; --force runs it again.
source "$(dirname "$0")/env.sh"
need requirements.txt
need scripts/requirements-data.txt --no-deps  # their own dependencies are heavy and not used

save="${SAVE:-results/table2_smollm2}"
status=0
"$PYTHON_BIN" scripts/sweep.py --save "$save" --epsilons "${EPSILON:-0.2}" --sparsities "${SPARSITY:-0.5 0.6 0.7}" \
    --methods "${METHODS:-dense magnitude wanda sparsegpt magnitude_ww wanda_ww sparsegpt_ww}" --model smollm2-135m \
    --calib_data wiki_leads --eval_data wiki_leads --seqlen 512 --nsamples 16 --eval_windows 20 "$@" || status=$?
if [ "$status" -gt 1 ]; then exit "$status"; fi  # a wrong flag, or Ctrl-C
echo
"$PYTHON_BIN" scripts/table.py "$save" --format "${FORMAT:-text}" || exit $?
cpu="$("$PYTHON_BIN" -c 'from lib.core import cpu; print(f"{len(cpu.usable())} cores ({cpu.model_name()})")')"
printf '\nmeasured on %s, %s\n' "$(date +%F)" "$cpu"
exit "$status"

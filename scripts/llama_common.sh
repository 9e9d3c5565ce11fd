# Sourced by llama*.sh: runs METHODS at SPARSITY in one process, each setting as the published script did.
#
#   [VARIABLE=value ...] bash scripts/llama_7b.sh [flags of sweep.py and main.py, which win over those set here]
#
#   MODEL     hub id or folder (paths are taken from the repository's root)     CACHE     folder of the metric cache
#   SPARSITY  "0.7", or several: "0.5 0.6 0.7"                                  SAVE      folder of the results
#   METHODS   "magnitude_ww wanda_ww sparsegpt_ww"; also dense, magnitude, wanda, sparsegpt (uniform) ...
#   FORCE=1   also what is complete already        DRY_RUN=1   print the command only
#
# A run whose run file says complete, with the same flags, is skipped. A run that fails does not stop the others.
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
need requirements.txt

methods="${METHODS:-magnitude_ww wanda_ww sparsegpt_ww}"
command=("$PYTHON_BIN" scripts/sweep.py --model "${MODEL:-$HUB}" --save "${SAVE:-results/$NAME}"
    --methods "$methods" --sparsities "${SPARSITY:-0.7}")
cache="${CACHE:-}"
if [ -z "$cache" ] && [ -z "${MODEL:-}" ]; then cache="$PUBLISHED_CACHE"; fi  # another model has another cache
case "$methods" in
    *_ww*)
        command+=(--epsilons "magnitude_ww=$EPSILON_MAGNITUDE,wanda_ww=$EPSILON_WANDA,sparsegpt_ww=$EPSILON_SPARSEGPT")
        if [ -n "$cache" ]; then command+=(--ww_metric_cache "$cache"); fi
        ;;
esac
# The published code cut every zero-shot task to 2000 questions for its largest models.
case " $* " in *" --eval_zero_shot "*) if [ -n "$ZERO_SHOT_LIMIT" ]; then command+=(--limit "$ZERO_SHOT_LIMIT"); fi ;; esac
if [ -n "${FORCE:-}" ]; then command+=(--force); fi
command+=("$@")

if [ -n "${DRY_RUN:-}" ]; then  # paths are the repository's, so that the line can be pasted anywhere
    printf 'cd %q && ' "$PWD"; printf '%q ' "${command[@]}"; echo
else
    exec "${command[@]}"
fi

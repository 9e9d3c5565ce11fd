# Sourced by llama*.sh: runs METHODS at SPARSITY, one after the other, each as the published script did.
#
#   [VARIABLE=value ...] bash scripts/llama_7b.sh [flags of main.py, which win over those set here]
#
#   MODEL     hub id or folder (paths are taken from the repository's root)     CACHE     folder of the metric cache
#   SPARSITY  "0.7", or several: "0.5 0.6 0.7"                                  SAVE      folder of the results
#   METHODS   "magnitude_ww wanda_ww sparsegpt_ww"; also dense, magnitude, wanda, sparsegpt (uniform) ...
#   FORCE=1   also what is complete already        DRY_RUN=1   print the commands only
#
# A run whose run file says complete, with the same flags, is skipped. A run that fails does not stop the others.
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
need requirements.txt

common=(--model "${MODEL:-$HUB}" --save "${SAVE:-results/$NAME}")
cache="${CACHE:-}"
if [ -z "$cache" ] && [ -z "${MODEL:-}" ]; then cache="$PUBLISHED_CACHE"; fi  # another model has a cache of its own
# The published code cut every zero-shot task to 2000 questions for its largest models.
case " $* " in *" --eval_zero_shot "*) if [ -n "$ZERO_SHOT_LIMIT" ]; then common+=(--limit "$ZERO_SHOT_LIMIT"); fi ;; esac

child="" failed=()
stop() {
    if [ -n "$child" ]; then kill "$child" 2>/dev/null || true; wait "$child" || true; fi
    echo "stopped; the same command goes on where this one was" >&2
    exit "$1"
}
trap 'stop 130' INT
trap 'stop 143' TERM

dense_done=""
for sparsity in ${SPARSITY:-0.7}; do
    for method in ${METHODS:-magnitude_ww wanda_ww sparsegpt_ww}; do
        if [ "$method" = dense ]; then  # once, whatever the sparsities
            if [ -n "$dense_done" ]; then continue; fi
            dense_done=1
        fi
        flags=("${common[@]}")
        if [ "$method" != dense ]; then flags+=(--prune_method "$method" --sparsity_ratio "$sparsity"); fi
        case "$method" in *_ww) if [ -n "$cache" ]; then flags+=(--ww_metric_cache "$cache"); fi ;; esac
        case "$method" in
            magnitude_ww) flags+=(--epsilon "$EPSILON_MAGNITUDE") ;;
            wanda_ww) flags+=(--epsilon "$EPSILON_WANDA") ;;
            sparsegpt_ww) flags+=(--epsilon "$EPSILON_SPARSEGPT") ;;
        esac
        flags+=("$@")
        if [ -n "${DRY_RUN:-}" ]; then printf 'main.py'; printf ' %q' "${flags[@]}"; echo; continue; fi
        what="$NAME: $method at $sparsity"
        if [ -z "${FORCE:-}" ] && "$PYTHON_BIN" scripts/is_complete.py "${flags[@]}"; then
            echo "$what is complete already, skipped (FORCE=1 runs it again)"
            continue
        fi
        echo "$what"
        "$PYTHON_BIN" main.py "${flags[@]}" &  # in the background, so that a signal is answered at once
        child=$!
        wait "$child" || failed+=("$method at $sparsity")
        child=""
    done
done
if [ ${#failed[@]} -gt 0 ]; then
    printf '%s failed: ' "$NAME" >&2; printf '%s; ' "${failed[@]}" >&2; echo "the same command runs only these again" >&2
    exit 1
fi

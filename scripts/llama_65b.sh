#!/usr/bin/env bash
# Table 2, LLaMA-65B: AlphaPruning at 0.7 with the published settings. How to change them: llama_common.sh.
NAME=llama_65b HUB=pinkmanlove/llama-65b-hf PUBLISHED_CACHE=data/llama-65b-hf ZERO_SHOT_LIMIT=2000
EPSILON_MAGNITUDE=0.4 EPSILON_WANDA=0.3 EPSILON_SPARSEGPT=0.3
source "$(dirname "$0")/llama_common.sh"

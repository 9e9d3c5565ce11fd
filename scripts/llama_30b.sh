#!/usr/bin/env bash
# Table 2, LLaMA-30B: AlphaPruning at 0.7 with the published settings. How to change them: llama_common.sh.
NAME=llama_30b HUB=pinkmanlove/llama-30b-hf PUBLISHED_CACHE=data/llama-30b-hf ZERO_SHOT_LIMIT=
EPSILON_MAGNITUDE=0.4 EPSILON_WANDA=0.3 EPSILON_SPARSEGPT=0.3
source "$(dirname "$0")/llama_common.sh"

#!/usr/bin/env bash
# Table 2, LLaMA-7B: AlphaPruning at 0.7 with the published settings. How to change them: llama_common.sh.
NAME=llama_7b HUB=pinkmanlove/llama-7b-hf PUBLISHED_CACHE=data/llama-7b-hf ZERO_SHOT_LIMIT=
EPSILON_MAGNITUDE=0.3 EPSILON_WANDA=0.2 EPSILON_SPARSEGPT=0.2
source "$(dirname "$0")/llama_common.sh"

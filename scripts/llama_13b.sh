#!/usr/bin/env bash
# Table 2, LLaMA-13B: AlphaPruning at 0.7 with the published settings. How to change them: llama_common.sh.
NAME=llama_13b HUB=pinkmanlove/llama-13b-hf PUBLISHED_CACHE=data/llama-13b-hf ZERO_SHOT_LIMIT=
EPSILON_MAGNITUDE=0.5 EPSILON_WANDA=0.3 EPSILON_SPARSEGPT=0.3
source "$(dirname "$0")/llama_common.sh"

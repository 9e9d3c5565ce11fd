#!/usr/bin/env bash
# Table 2, Llama-2-13B: AlphaPruning at 0.7 with the published settings. How to change them: llama_common.sh.
NAME=llama2_13b HUB=meta-llama/Llama-2-13b-hf PUBLISHED_CACHE=data/llama2-13b-hf ZERO_SHOT_LIMIT=
EPSILON_MAGNITUDE=0.4 EPSILON_WANDA=0.3 EPSILON_SPARSEGPT=0.3
source "$(dirname "$0")/llama_common.sh"

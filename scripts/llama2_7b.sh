#!/usr/bin/env bash
# Table 2, Llama-2-7B: AlphaPruning at 0.7 with the published settings. How to change them: llama_common.sh.
NAME=llama2_7b HUB=meta-llama/Llama-2-7b-hf PUBLISHED_CACHE=data/llama2-7b-hf ZERO_SHOT_LIMIT=
EPSILON_MAGNITUDE=0.5 EPSILON_WANDA=0.3 EPSILON_SPARSEGPT=0.2
source "$(dirname "$0")/llama_common.sh"

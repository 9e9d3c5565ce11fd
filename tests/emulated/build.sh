# Sourced by run.sh and arm.sh: build NAME FLAG ... compiles lib/sparse's sources for one instruction set to NAME-*.o, with
# NAME_ before the names of their functions, so that one program holds several.
build() {
  local level=$1 renamed=() name source
  shift
  for name in multiply unpack multiply_many request_tiles multiply_tiles solve_block decode; do
    renamed+=("-D$name=${level}_$name")
  done
  for source in "$(dirname "${BASH_SOURCE[0]}")"/../../lib/sparse/csrc/*.cpp; do
    "${CXX:-g++}" -O3 -std=c++17 "$@" "${renamed[@]}" -c "$source" -o "$level-$(basename "$source" .cpp).o"
  done
}

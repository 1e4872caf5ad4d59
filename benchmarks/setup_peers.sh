#!/usr/bin/env bash
# Creates one virtual environment per peer under benchmarks/.venvs/ (git-ignored).
#
#   benchmarks/setup_peers.sh [PEER...]        PEER: transformers openvino-genai onnxruntime-genai llama-cpp
#
# A peer that does not install leaves its reason in .venvs/PEER.failed, and peers.py reports it as absent.
# PyPI's torch for Linux brings CUDA along; PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu avoids that.
set -uo pipefail
cd "$(dirname "$0")"

PYTHON=${PYTHON:-python3}
TORCH="torch==2.13.0"

packages() {
  case $1 in
    transformers) echo "$TORCH transformers==5.23.0" ;;
    # optimum-intel converts the checkpoint; it needs an older transformers, and lists torchvision
    # among its requirements although no causal LM uses it, hence --no-deps (see install).
    openvino-genai) echo "$TORCH openvino-genai==2026.4.1.0 openvino==2026.4.1 openvino-tokenizers==2026.4.1.0 \
      transformers==5.5.* optimum==2.3.* nncf>=3.3 onnx requests" ;;
    onnxruntime-genai) echo "$TORCH onnxruntime-genai==0.18.0 onnxruntime==1.32.0 transformers==5.5.* onnx onnx-ir" ;;
    # No wheels: compiled for this CPU, which takes a C++ compiler and 10 to 40 minutes. Its quantizer wants GGUF.
    # pip would keep the compiled wheel and take it again after a change of CPU or compiler, hence --no-cache-dir.
    llama-cpp) echo "--no-cache-dir llama-cpp-python==0.3.36 gguf==0.19.0 numpy" ;;
    *) echo "unknown peer: $1" >&2; return 2 ;;
  esac
}

install() {
  local peer=$1 venv=.venvs/$1 wanted
  wanted=$(packages "$peer") || return
  "$PYTHON" -m venv "$venv" || return
  # shellcheck disable=SC2086
  CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" CXXFLAGS="-include $PWD/peers/amx_tile_config.h" \
    "$venv/bin/python" -m pip install --quiet $wanted || return
  if [ "$peer" = openvino-genai ]; then
    "$venv/bin/python" -m pip install --quiet --no-deps optimum-intel==2.2.0 || return
  fi
}

mkdir -p .venvs
[ $# -gt 0 ] || set -- transformers openvino-genai onnxruntime-genai llama-cpp
status=0
for peer in "$@"; do
  echo "== $peer"
  rm -f ".venvs/$peer.failed"
  if ! install "$peer" > ".venvs/$peer.log" 2>&1; then
    tail -n 5 ".venvs/$peer.log" > ".venvs/$peer.failed"
    echo "$peer: not installed, see .venvs/$peer.log" >&2
    status=1
  fi
done
exit $status

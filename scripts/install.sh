#!/bin/sh
# Makes a virtual environment and installs the packages of requirement files: scripts/install.sh FOLDER PYTHON FILE...
# With uv where it is there, else with venv and pip. On Linux without an NVIDIA card, PyTorch is the CPU build, a tenth
# of the download. Where its host cannot be reached, it is the default build.
set -eu
folder=$1 python=$2
shift 2
cpu_builds=https://download.pytorch.org/whl/cpu

"$python" -c "import sys; sys.exit('Python 3.10 or later is needed: make PYTHON=python3.11' if sys.version_info < (3, 10) else 0)"

if command -v uv > /dev/null; then
    [ -x "$folder/bin/python" ] || uv venv --quiet --seed --python "$python" "$folder"
    install() { uv pip install --quiet --python "$folder/bin/python" "$@"; }
else
    "$python" -m venv "$folder"
    install() { "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
fi

has_nvidia_card() {
    [ -e /dev/nvidia0 ] || { command -v nvidia-smi && nvidia-smi -L; } > /dev/null 2>&1
}

if [ "$(uname -s)" = Linux ] && ! has_nvidia_card && ! "$folder/bin/python" -c "import torch" 2> /dev/null; then
    torch=$(grep '^torch==' requirements.txt)
    export PIP_DEFAULT_TIMEOUT=15 PIP_RETRIES=1 UV_HTTP_TIMEOUT=15 UV_HTTP_RETRIES=1  # for this one download
    install --index-url "$cpu_builds" "$torch" || echo "$cpu_builds cannot be reached: installing the default build" >&2
    unset PIP_DEFAULT_TIMEOUT PIP_RETRIES UV_HTTP_TIMEOUT UV_HTTP_RETRIES
fi

for file in "$@"; do
    install -r "$file"
done

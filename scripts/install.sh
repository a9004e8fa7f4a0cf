#!/bin/sh
# Makes a virtual environment and installs requirement files into it: scripts/install.sh FOLDER PYTHON FILE...
# With uv where it is there, else with venv and pip. On Linux without an NVIDIA card, PyTorch is the CPU build, a tenth
# of the download. Where its host cannot be reached, it is the default build.
set -eu
folder=$1 python=$2
shift 2
cpu_builds=https://download.pytorch.org/whl/cpu

if ! "$python" -c "import sys; sys.exit(sys.version_info < (3, 10))"; then
    echo "error: Python 3.10 or later is needed: make PYTHON=python3.11" >&2
    exit 2
fi

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

if [ "$(uname -s)" = Linux ] && ! has_nvidia_card; then
    torch=$(grep '^torch==' requirements.txt)
    (
        export PIP_DEFAULT_TIMEOUT=15 PIP_RETRIES=1 UV_HTTP_TIMEOUT=15 UV_HTTP_RETRIES=1
        install --index-url "$cpu_builds" "$torch"
    ) || echo "note: no CPU build of PyTorch from $cpu_builds: installing the default build" >&2
fi

for file in "$@"; do
    install -r "$file"
done

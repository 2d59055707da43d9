#!/bin/sh
# Installs loraplane and what it runs on into a fresh virtual environment: install.sh TARGET [EXTRA], from the repository's root.
# The Dockerfiles call it; deploy/check-install.sh calls it where there is no Docker engine.
set -eu
target=${1:?usage: install.sh TARGET [EXTRA]}
extra=${2:+[$2]}
python3 -m venv "$target"
"$target/bin/python" -m pip install --no-cache-dir --disable-pip-version-check -c constraints.txt ".$extra"
# From elsewhere, so that a module or a data file left out of the package is seen when the image is built.
cd /
"$target/bin/python" -m controlplane --help >/dev/null
"$target/bin/python" -m dataplane --help >/dev/null
"$target/bin/python" -c 'import controlplane.app, dataplane.assembly, dataplane.server, kernels.lora_torch'
"$target/bin/loraplane" --version

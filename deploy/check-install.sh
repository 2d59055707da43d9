#!/bin/sh
# Runs an image's install steps without a Docker engine: the files that its Dockerfile copies, and nothing else, in a clean root
# with a clean environment. check-install.sh [cpu|cuda]; cuda takes gigabytes of wheels, and a C++ compiler, but no GPU.
set -eu
cd "$(dirname "$0")/.."
dockerfile=deploy/Dockerfile.${1:-cpu}
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
mkdir -p "$root/src/deploy" "$root/home"
# The COPY lines of the build stage are the truth, and so is what it calls install.sh with.
for file in $(sed -n '/^COPY --from/d; s/^COPY \(.*\) [^ ]*$/\1/p' "$dockerfile"); do
    cp -R "$file" "$root/src/$file"
done
extras=$(sed -n 's/^RUN sh deploy\/install.sh \/opt\/loraplane *//p' "$dockerfile")
cd "$root/src"
# pip's own settings stay: where packages come from is the machine's business.
pip_settings=$(env | grep '^PIP_' || true)
env -i PATH="$PATH" HOME="$root/home" $pip_settings sh deploy/install.sh "$root/opt" $extras
echo "the install steps of $dockerfile run in a clean root"

#!/bin/sh
# Runs the images' install steps without a Docker engine: the files that the Dockerfiles copy, and nothing else, in a clean
# root with a clean environment.
set -eu
cd "$(dirname "$0")/.."
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
mkdir -p "$root/src/deploy" "$root/home"
# The COPY lines of the first stage are the truth.
for file in $(sed -n '/^COPY --from/d; s/^COPY \(.*\) [^ ]*$/\1/p' deploy/Dockerfile.cpu); do
    cp -R "$file" "$root/src/$file"
done
cd "$root/src"
# pip's own settings stay: where packages come from is the machine's business.
pip_settings=$(env | grep '^PIP_' || true)
env -i PATH="$PATH" HOME="$root/home" $pip_settings sh deploy/install.sh "$root/opt"
echo "the install steps of deploy/Dockerfile.cpu run in a clean root"

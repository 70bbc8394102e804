#!/usr/bin/env bash
# mypy over the packages as they are installed, where backends/ is npllm.backends.
set -euo pipefail
cd "$(dirname "$0")/.."
seen=$(mktemp -d)
trap 'rm -rf "$seen"' EXIT
mkdir "$seen/npllm"
ln -s "$PWD"/npllm/* "$PWD/backends" "$seen/npllm/"
config=$PWD/pyproject.toml cache=$PWD/.mypy_cache
cd "$seen"
"${MYPY:-mypy}" --config-file "$config" --cache-dir "$cache" npllm

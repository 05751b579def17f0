#!/usr/bin/env bash
# Holds the build to the rust-version in Cargo.toml. With any toolchain: no locked dependency may ask for a later one. With
# that very toolchain, where rustup has it: everything must compile. (Clippy looks between the two: its incompatible_msrv
# refuses a standard library function that came later; syntax and target features that came later pass it.)
set -euo pipefail
cd "$(dirname "$0")/.."

version=$(cargo metadata --locked --format-version 1 --filter-platform "$(rustc --print host-tuple)" | python3 -c '
import json, sys

def key(version):
    return [int(part) for part in version.split(".")[:2]]

packages = json.load(sys.stdin)["packages"]
[ours] = [package["rust_version"] for package in packages if package["name"] == "sharpi"]
for package in packages:
    theirs = package["rust_version"]
    if theirs and key(theirs) > key(ours):
        name, version = package["name"], package["version"]
        sys.exit(f"{name} {version} needs Rust {theirs}, more than the rust-version {ours} in Cargo.toml")
print(ours)
')
toolchain=$(rustup toolchain list 2>/dev/null | grep -o "^$version[^ ]*" | head -1) || true
if [ -n "$toolchain" ]; then
    CARGO_TARGET_DIR=target/rust-version cargo "+$toolchain" check --locked --workspace --all-targets
else
    echo "no Rust $version here: syntax and target features that came later go unnoticed" >&2
fi

#!/usr/bin/env bash
# Builds the Dockerfile without Docker, on a Debian base created here, and tests the image.
#
#   tests/launch/build_image.sh FOLDER
#
# Hardware: root, `apt-get install buildah debootstrap`, 3 GB in FOLDER, which receives all output. If
# overlayfs cannot be mounted, set STORAGE_DRIVER=vfs: it copies every layer and is many times slower.
# pip finds packages as it does outside: its settings, and the paths they name, are mounted during the
# build and do not become part of the image.
# Expect: several minutes. The image is built twice, with different code: the second build takes the
# dependencies from the cache. The last lines are those of pytest in the image, and `built`.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${1:?a folder for all output}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
export BUILDAH_ISOLATION=chroot
storage=(--root "$folder/store" --runroot "$folder/run" --storage-driver "${STORAGE_DRIVER:-overlay}")

buildah() { command buildah "${storage[@]}" "$@"; }

# ---- a base: Debian with Python
if ! buildah inspect --type image localhost/base:test > /dev/null 2>&1; then
    debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv bookworm \
        "$folder/rootfs" > "$folder/debootstrap.log"
    tar -C "$folder/rootfs" -cf "$folder/base.tar" .
    base=$(buildah from scratch)
    buildah add --quiet "$base" "$folder/base.tar" / > /dev/null
    buildah commit --quiet "$base" localhost/base:test > /dev/null
    buildah rm "$base" > /dev/null
    rm -r "$folder/rootfs" "$folder/base.tar"
fi

# ---- pip settings of this machine
{
    echo "[global]"
    python3 -m pip config list | sed -nE "s/^(global|:env:)\.([a-z-]+)='(.*)'\$/\2 = \3/p" |
        sort -u -t = -k 1,1
} > "$folder/pip.conf"
mounts=(--volume "$folder/pip.conf:/etc/pip.conf:ro")
while read -r path; do
    [ -e "$path" ] && mounts+=(--volume "$path:$path:ro")
    # A local index keeps its files beside its pages.
done < <(grep -oE '(= |file://)/[^ ]+' "$folder/pip.conf" | sed -E 's,^(= |file://),,; s,/simple/?$,,' | sort -u)

# ---- build twice: with modified code, then as it is
build() {
    buildah bud --layers --network host --pull-never "${mounts[@]}" \
        --build-arg BASE=localhost/base:test --tag localhost/unet:test "$1"
}
mkdir -p "$folder/other"
cp -r --parents Dockerfile .dockerignore pyproject.toml README.md LICENSE launch/constraints.txt \
    unet shards pipelines "$folder/other"
echo "other" >> "$folder/other/README.md"
echo "raise ImportError('other code')" >> "$folder/other/unet/__init__.py"
build "$folder/other"
build . | tee "$folder/second.log"
grep -A 1 'RUN python3 -m venv' "$folder/second.log" | grep -q 'Using cache'

# ---- the contents of the image
image=$(buildah from --pull-never localhost/unet:test)
inside() { buildah run --network host "$@"; }
[ "$(inside "$image" -- id -u)" = 10001 ]
inside "$image" -- unet --help > /dev/null
# For --compile.
inside "$image" -- g++ --version > /dev/null
inside "$image" -- python3 -c \
    'import pathlib, sysconfig; assert pathlib.Path(sysconfig.get_path("include"), "Python.h").exists()'
inside "$image" -- unet demo --out /data/demo --size 64 --steps 20
inside "$image" -- test -s /data/demo/run/report.html

# ---- the tests, on the installed package
buildah add --quiet "$image" tests /opt/tested/tests > /dev/null
buildah add --quiet "$image" pyproject.toml launch/constraints.txt /opt/tested > /dev/null
inside --user root "${mounts[@]}" "$image" -- /opt/venv/bin/pip install --quiet --no-cache-dir \
    -c /opt/tested/constraints.txt hypothesis psutil pytest pytest-timeout
inside --workingdir /opt/tested "$image" -- python -m pytest -q -p no:cacheprovider \
    tests/unet/test_model.py tests/shards/test_order.py tests/pipelines/test_pack_parts.py \
    tests/pipelines/test_predict.py tests/pipelines/test_stream.py
echo built

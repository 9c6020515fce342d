# shellcheck shell=bash
# Sourced by quickstart.sh and tests/run.sh: makes .venv at the top of the checkout and activates it.
#
#   . launch/install.sh core|EXTRA     EXTRA: an extra of pyproject.toml, such as dev
#
# torch comes first and alone: where a CPU build of this version is on offer pip takes that, elsewhere
# the CUDA build. What is installed already is left as it is.
if [ ! -d .venv ]; then
    "${PYTHON:-python3}" -m venv .venv
fi
# shellcheck source=/dev/null
. .venv/bin/activate
stamp=".venv/.installed-$1"
if [ ! -f "$stamp" ] || [ pyproject.toml -nt "$stamp" ] || [ launch/constraints.txt -nt "$stamp" ]; then
    torch=$(grep '^torch==' launch/constraints.txt)
    extra=
    [ "$1" = core ] || extra="[$1]"
    pip install --quiet --disable-pip-version-check "$torch"
    pip install --quiet --disable-pip-version-check -c launch/constraints.txt -e ".$extra"
    touch "$stamp"
fi

# shellcheck shell=bash
# Sourced by quickstart.sh and tests/run.sh: creates .venv at the top of the checkout and activates
# it.
#
#   . launch/install.sh core|EXTRA     EXTRA: an extra of pyproject.toml, such as dev
#
# torch is installed first and alone, so that pip prefers a CPU build of this version where one is
# available, and the CUDA build elsewhere. An up-to-date installation is not touched.
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

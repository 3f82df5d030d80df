# Read by the commands beside it, with `. environment.sh`: where the checkout and its private environment
# are, and whether that environment is ready. The whole answer costs a millisecond or two and starts no
# Python: the set-up (scripts/environment/) leaves a stamp of three lines and a copy of constraints.txt, and
# both have to match. Plain POSIX sh.

here=$0
case $here in */*) here=${here%/*} ;; *) here=. ;; esac
root=$(cd "$here/.." && pwd -P)
venv=${QNEXT_VENV:-$root/.venv}
case $venv in /*) ;; *) venv=$PWD/$venv ;; esac

# Ready: made for this checkout, from these pins, with an engine (unless none is wanted) that was compiled
# with the CMAKE_ARGS given now. CMAKE_ARGS left unset means "as it was built".
environment_is_ready() {
    [ -x "$venv/bin/python" ] && [ -r "$venv/qnext-ready" ] && [ -z "${QNEXT_REBUILD_ENGINE:-}" ] || return 1
    { IFS= read -r made_for && IFS= read -r engine && IFS= read -r switches; } <"$venv/qnext-ready" || return 1
    [ "$made_for" = "$root" ] || return 1
    if [ -z "${QNEXT_NO_ENGINE:-}" ]; then
        [ "$engine" = engine ] && [ "${CMAKE_ARGS-$switches}" = "$switches" ] || return 1
    fi
    cmp -s "$root/constraints.txt" "$venv/qnext-constraints.txt"
}

find_python() {
    for python in ${QNEXT_PYTHON:-python3 python3.13 python3.12 python3.14 python3.11 python}; do
        "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null && return
    done
    found=$("${QNEXT_PYTHON:-python3}" --version 2>&1) || found="no python3 that works"
    echo "qnext needs Python 3.11 to 3.14; here is ${found}." >&2
    echo "Install one: sudo apt install python3.11 python3.11-venv (Debian, Ubuntu), sudo dnf install python3.13 (Fedora), brew install python@3.13 (macOS); QNEXT_PYTHON=/path/to/python names one." >&2
    exit 1
}

need_environment() {
    environment_is_ready && return
    find_python
    (cd "$root/scripts" && exec "$python" -E -s -m environment "$root" "$venv") || exit $?
}

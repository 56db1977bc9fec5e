# Sourced by `segue` and `test`: finds the project's virtual environment, makes it on first use, runs a module in it.
#
# The second time this costs a few milliseconds: the stamp of the last installation is compared with pyproject.toml and with
# bootstrap.py, and only where they differ (or an installation was interrupted) is bootstrap.py run.

is_usable() { # 3.11 to 3.14: what the dependencies are built for
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' >/dev/null 2>&1
}

has_venv() {
    "$1" -c 'import ensurepip, venv' >/dev/null 2>&1
}

find_python() { # prints the first suitable interpreter; one that can make virtual environments is preferred
    for wanted in has_venv is_usable; do
        for name in python3 python3.13 python3.12 python3.11 python3.14 /usr/bin/python3; do
            if command -v "$name" >/dev/null 2>&1 && is_usable "$name" && "$wanted" "$name"; then
                printf '%s\n' "$name"
                return 0
            fi
        done
    done
    return 1
}

is_installed() {
    stamp=$root/.venv/.segue-$1
    [ -f "$stamp/root" ] && [ ! -e "$root/.venv/.segue-installing" ] && [ -x "$root/.venv/bin/python" ] &&
        read -r installed_root <"$stamp/root" && [ "$installed_root" = "$root" ] &&
        cmp -s "$root/pyproject.toml" "$stamp/pyproject.toml" && cmp -s "$root/tools/bootstrap.py" "$stamp/bootstrap.py"
}

start() { # start <level: serve or test> <module> [arguments]
    level=$1
    module=$2
    shift 2
    root=$(CDPATH='' cd -- "$here/.." && pwd -P)
    if ! is_installed "$level"; then
        if ! python=$(find_python); then
            echo "segue: Python 3.11 to 3.14 is needed, and there is none on the PATH (python3 is $(python3 --version 2>&1))." >&2
            echo "segue: install it (Debian, Ubuntu: apt install python3.11 python3.11-venv; macOS: brew install python@3.12)." >&2
            exit 1
        fi
        "$python" "$root/tools/bootstrap.py" "$level" || exit $?
    fi
    PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
    export PYTHONPATH
    exec "$root/.venv/bin/python" -P -m "$module" "$@"
}

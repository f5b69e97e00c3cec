#!/bin/sh
# Installs effbench from this bundle, without network. See: install.sh --help
# What is between the marks is a Python program; the rest finds a Python to run it with.
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd) || exit 1
want=@PYTHON@ chosen= next=
fits='import sys; sys.exit("%d.%d" % sys.version_info[:2] != "'$want'")'
for word in "$@"; do
  [ -n "$next" ] && chosen=$word next=
  case $word in
    --python) next=1 ;;
    --python=*) chosen=${word#--python=} ;;
    --check | --help | -h) fits='import sys; sys.exit(sys.version_info < (3, 11))' ;;
  esac
done

run_with() {
  python=$1
  shift
  command -v "$python" >/dev/null 2>&1 && "$python" -c "$fits" 2>/dev/null || return
  exec "$python" -P - "$here" "$@" <<'EFFBENCH_INSTALLER'
@INSTALLER@
EFFBENCH_INSTALLER
}

if [ -n "$chosen" ]; then
  run_with "$chosen" "$@"
else
  for python in python3 "python$want" python; do
    run_with "$python" "$@"
  done
fi
echo "Error: this bundle is for Python $want; ${chosen:-python3} is another one or not there." >&2
echo "Say which: install.sh PREFIX --python /path/to/python$want" >&2
exit 2

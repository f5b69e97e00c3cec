#!/bin/sh
# Installs effbench from this bundle, without network. See: install.sh --help
# Everything below the marker is a Python program; this finds a Python to run it with.
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd) || exit 1
want=@PYTHON@ chosen= next=
for word in "$@"; do
  [ -n "$next" ] && chosen=$word next=
  case $word in --python) next=1 ;; --python=*) chosen=${word#--python=} ;; esac
done
is_wanted='import sys; sys.exit("%d.%d" % sys.version_info[:2] != "'$want'")'
for python in ${chosen:-python3 python$want python}; do
  if command -v "$python" >/dev/null 2>&1 && "$python" -c "$is_wanted" 2>/dev/null; then
    exec "$python" -P - "$here" "$@" <<'EFFBENCH_INSTALLER'
@INSTALLER@
EFFBENCH_INSTALLER
  fi
done
echo "Error: this bundle is for Python $want; ${chosen:-python3} is another one or not there." >&2
echo "Say which: install.sh PREFIX --python /path/to/python$want" >&2
exit 2

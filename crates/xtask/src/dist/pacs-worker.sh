#!/bin/sh
# Starts pacs-worker with libtorch, which is the first of
#   1. $LIBTORCH, a folder with lib/libtorch_cpu.so,
#   2. the folder libtorch/torch of this installation,
#   3. the package torch of $PACS_PYTHON, or else of python3.
# A program that links a library cannot report itself that it is missing or too old, because the loader fails before it starts.
wanted=@TORCH@

fail() {
  echo "error: failed to find libtorch for pacs-worker: $1" >&2
  echo "hint: $2" >&2
  exit 78
}

here=$(dirname "$(readlink -f "$0")")
root=$(dirname "$here")
python=${PACS_PYTHON:-python3}
install="install it: $python -m pip install torch==$wanted"

if [ -n "${LIBTORCH:-}" ]; then
  torch=$LIBTORCH
  install="let LIBTORCH name a libtorch $wanted, or unset it to use the Python package torch"
  [ -e "$torch/lib/libtorch_cpu.so" ] || fail "LIBTORCH is $torch, which has no lib/libtorch_cpu.so" "$install"
elif [ -e "$root/libtorch/torch/lib/libtorch_cpu.so" ]; then
  torch=$root/libtorch/torch
  install="replace it: rm -r $root/libtorch && $python -m pip install --target $root/libtorch torch==$wanted"
else
  command -v "$python" >/dev/null 2>&1 ||
    fail "there is no program $python to ask for the package torch" "install Python with torch $wanted, or let PACS_PYTHON name an interpreter that has it"
  # The package is found and not imported, which would take seconds. The current folder is no place for packages.
  torch=$("$python" -c '
import sys
sys.path = [folder for folder in sys.path if folder]
from importlib.util import find_spec
spec = find_spec("torch")
print(spec.submodule_search_locations[0] if spec and spec.origin else "")
') || fail "$python cannot be asked for the package torch" "let PACS_PYTHON name an interpreter that works"
  [ -n "$torch" ] || fail "$python has no package torch" "$install"
  [ -e "$torch/lib/libtorch_cpu.so" ] || fail "the package torch at $torch has no lib/libtorch_cpu.so" "$install"
fi

# The package says its version in version.py, the archive of libtorch in build-version; a libtorch without either is taken as it is.
version=
if [ -e "$torch/version.py" ]; then
  version=$(sed -n "s/^__version__ *= *['\"]\([^'\"]*\)['\"].*/\1/p" "$torch/version.py")
elif [ -e "$torch/build-version" ]; then
  version=$(cat "$torch/build-version")
fi
case $version in
  "" | "$wanted" | "$wanted"+*) ;;
  *) fail "torch at $torch is $version, and this program needs $wanted" "$install" ;;
esac

LD_LIBRARY_PATH=$torch/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export LD_LIBRARY_PATH
exec "$root/libexec/pacs-worker" "$@"

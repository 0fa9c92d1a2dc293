#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
#     compile.sh SOURCE UNIT OBJECT COMMAND...
#
# Runs COMMAND with UNIT appended: a file at a fixed path that includes SOURCE. nvcc derives the
# names of internal symbols from the real path of the file it is given, so the path must be the
# same in every checkout for the object to be. It lies in /tmp whether or not the sandbox's /tmp is
# the machine's: every build, and every user, writes the same line.
set -eu
source=$1 unit=$2 object=$3
shift 3

line="#include \"$source\""
if [ "$(cat "$unit" 2> /dev/null)" != "$line" ]; then
  (umask 000 && mkdir -p "${unit%/*}") &&
    printf '%s\n' "$line" > "$unit.$$" && mv -f "$unit.$$" "$unit" || {
    echo "compile.sh: cannot write $unit; if another user made it, have it removed" >&2
    exit 1
  }
fi

# nvcc names temporary files by its process number, which in a sandbox is nearly always the same.
TMPDIR=$PWD/$object.tmp
export TMPDIR
mkdir -p "$TMPDIR"
trap 'rm -rf "$TMPDIR"' EXIT
"$@" "$unit"

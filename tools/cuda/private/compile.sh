#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
#     compile.sh SOURCE UNIT COMMAND...
#
# Runs COMMAND with UNIT appended: a file at a fixed path that includes SOURCE. nvcc derives the
# names of internal symbols from the real path of the file it is given, so the path must be the
# same in every checkout for the object to be. The sandbox's /tmp is private to the action; where
# there is none, every build writes the same line.
set -eu
source=$1 unit=$2
shift 2
line="#include \"$source\""
if [ "$(cat "$unit" 2> /dev/null)" != "$line" ]; then
  mkdir -p "${unit%/*}"
  printf '%s\n' "$line" > "$unit.$$"
  mv -f "$unit.$$" "$unit"
fi
exec "$@" "$unit"

#!/usr/bin/env bash
# Runs what shakes the repository for TORTURE (default 10m) in all: every act failing at
# every operation; random walks of several processes against a model; true processes
# that are killed. A failing walk names its seed. Without the race detector, which make
# test has: here the number of tries counts.
set -euo pipefail
cd "$(dirname "$0")/.."

total=${TORTURE:-10m}
# go test knows durations; seconds are what a shell can divide.
seconds=0
rest=$total
while [[ $rest =~ ^([0-9]+)(h|m|s)(.*)$ ]]; do
	case ${BASH_REMATCH[2]} in
	h) seconds=$((seconds + BASH_REMATCH[1] * 3600)) ;;
	m) seconds=$((seconds + BASH_REMATCH[1] * 60)) ;;
	s) seconds=$((seconds + BASH_REMATCH[1])) ;;
	esac
	rest=${BASH_REMATCH[3]}
done
if [[ -n $rest ]] || ((seconds == 0)); then
	echo "torture: TORTURE is $total: a duration such as 90s, 10m or 2h30m is wanted"
	exit 2
fi

work=$(mktemp -d /tmp/hikae-torture.XXXXXX)
chmod 755 "$work" # some tests give up root, and go on in here
trap 'rm -rf "$work"' EXIT
export TMPDIR=$work

began=$SECONDS
failed=0

# once NAME PACKAGE: a test that ends when all is tried, however long that takes.
once() {
	echo "torture: $1"
	HIKAE_TORTURE=1s go test -count=1 -timeout 0 -run "$1" "$2" || failed=1
}
# long SHARE NAME PACKAGE: a test that goes on for a percentage of what is left.
long() {
	local left=$(((seconds - (SECONDS - began)) * $1 / 100))
	((left >= 10)) || left=10
	echo "torture: $2, ${left}s"
	HIKAE_TORTURE=${left}s go test -count=1 -timeout 0 -run "$2" "$3" || failed=1
}

once '^(TestTortureEveryOperation|TestPruneFailsAnywhere|TestErrorAtEveryOperation)$' ./repo
long 60 '^TestTortureWalk$' ./repo
long 100 '^TestProcesses$' ./cmd/hikae
if ((failed)); then
	echo "torture: FAILED"
	exit 1
fi
echo "torture: ok"

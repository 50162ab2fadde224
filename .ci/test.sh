#!/usr/bin/env bash
# Fuzzing and all tests, in a temporary directory of their own, and then a look
# at what they left behind: no mount, no process, no loop device, no file.
# PACKAGES narrows the tests (default ./...), FUZZ_BUDGET=0 leaves the fuzzing out.
set -euo pipefail
cd "$(dirname "$0")/.."

# Short, because the paths of Unix sockets may have 107 bytes only.
work=$(mktemp -d /tmp/hikae.XXXXXX)
chmod 755 "$work" # some tests give up root, and go on in here
export TMPDIR=$work

# leftovers names what still stands in or works in the temporary directory.
leftovers() {
	local found=0 pid
	if grep -F " $work/" /proc/self/mounts; then
		echo "test: these mounts were left behind"
		found=1
	fi
	for pid in /proc/[0-9]*; do
		pid=${pid#/proc/}
		[[ $pid != "$$" && $pid != "$BASHPID" ]] || continue
		if tr '\0' '\n' 2>/dev/null <"/proc/$pid/environ" | grep -q "^TMPDIR=$work"; then
			case $(cat "/proc/$pid/comm" 2>/dev/null) in
			hikae* | esxisim* | *.test)
				echo "test: process $pid was left behind: $(tr '\0' ' ' <"/proc/$pid/cmdline")"
				found=1
				;;
			esac
		fi
	done
	if command -v losetup >/dev/null && losetup -l -n -O NAME,BACK-FILE 2>/dev/null | grep -F "$work/"; then
		echo "test: these loop devices were left behind"
		found=1
	fi
	if [[ -n $(ls -A "$work") ]]; then
		echo "test: these files were left behind in $work:"
		ls -A "$work"
		found=1
	fi
	return "$found"
}

race=(-race)
if ! command -v "$(go env CC)" >/dev/null; then
	race=()
	echo "test: no C compiler, so the race detector is left out; install one with: apt-get install gcc libc6-dev"
	[[ -z ${CI:-} ]] || exit 1
fi

failed=0
[[ ${FUZZ_BUDGET:-} == 0 ]] || bash .ci/fuzz.sh || failed=1
# shellcheck disable=SC2086 # several packages are several words
go test "${race[@]}" -timeout 20m -p 2 ${PACKAGES:-./...} || failed=1

# Servers that were told to end may still be at it.
for _ in {1..20}; do
	if leftovers >/dev/null; then
		break
	fi
	sleep 0.25
done
if leftovers; then
	rm -rf "$work"
else
	failed=1
fi
if ((failed)); then
	echo "test: FAILED"
	exit 1
fi

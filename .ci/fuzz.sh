#!/usr/bin/env bash
# Fuzzes every Fuzz target for a few seconds: enough to run each decoder over
# thousands of broken inputs. FUZZ_BUDGET is the time in seconds that all targets
# share (default 60), after their packages are built. A failing input is left in
# the package's testdata/fuzz, where go test runs it from then on.
set -euo pipefail
cd "$(dirname "$0")/.."

budget=${FUZZ_BUDGET:-60}
work=$(mktemp -d "${TMPDIR:-/tmp}/hikae-fuzz.XXXXXX")
trap 'rm -rf "$work"' EXIT

# One line for each target: package, directory, name.
mapfile -t packages < <(grep -rlE --include='*_test.go' '^func Fuzz[A-Za-z0-9_]*\(' . | xargs -rn1 dirname | sort -u)
targets=()
for dir in "${packages[@]}"; do
	mapfile -t names < <(go test -list '^Fuzz' "$dir" | grep '^Fuzz' || true)
	for name in "${names[@]}"; do
		targets+=("$dir $name")
	done
done
if ((${#targets[@]} == 0)); then
	echo "fuzz: no targets"
	exit 1
fi
each=$((budget / ${#targets[@]}))
((each >= 1)) || each=1
((each <= 5)) || each=5
echo "fuzz: ${#targets[@]} targets, $each s each"

failed=0
last=
for target in "${targets[@]}"; do
	read -r dir name <<<"$target"
	# One instrumented binary for all targets of a package.
	if [[ $dir != "$last" ]]; then
		go test -c -fuzz=Fuzz -o "$work/fuzz.test" "$dir"
		last=$dir
	fi
	if (cd "$dir" && "$work/fuzz.test" -test.run='^$' -test.fuzz="^$name\$" -test.fuzztime="${each}s" \
		-test.fuzzminimizetime=5s -test.fuzzcachedir="$work/cache" -test.parallel=2) >"$work/log" 2>&1; then
		continue
	fi
	# The fuzzing engine sometimes reports the end of its own time as a failure on a
	# busy machine (golang/go#75804, mended in Go 1.27). A real finding always names its input.
	if grep -qx '    context deadline exceeded' "$work/log" && ! grep -q -e 'Failing input' -e panic -e 'fuzzing process' "$work/log"; then
		continue
	fi
	echo "fuzz: $dir: $name FAILED"
	cat "$work/log"
	failed=1
done
((failed)) || echo "fuzz: ok"
exit "$failed"

#!/usr/bin/env bash
# Formatting and linters. A linter that is not installed is named and left out,
# unless CI is set: then it has to be there (make tools; .ci/run installs all).
set -euo pipefail
cd "$(dirname "$0")/.."

failed=0
have() {
	if command -v "$1" >/dev/null 2>&1; then
		return 0
	fi
	echo "lint: $1 is not installed, its checks are left out; install it with: $2"
	[[ -z ${CI:-} ]] || failed=1
	return 1
}

if have gofumpt 'make tools'; then
	unformatted=$(find . -path ./.cache -prune -o -name '*.go' -exec gofumpt -l {} +)
	if [[ -n $unformatted ]]; then
		echo "lint: not formatted (gofumpt -w FILE):"
		echo "$unformatted"
		failed=1
	fi
fi

echo "lint: go vet"
go vet ./... || failed=1

if have golangci-lint 'make tools'; then
	echo "lint: golangci-lint"
	golangci-lint run --allow-parallel-runners ./... || failed=1
fi

if have shellcheck 'apt-get install shellcheck'; then
	find .ci contrib -type f \( -name '*.sh' -o -path .ci/run \) -exec shellcheck {} + || failed=1
fi

exit "$failed"

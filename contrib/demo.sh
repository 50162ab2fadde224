#!/usr/bin/env bash
# The whole road once, on this machine alone: a simulated ESXi host with a VM
# whose disk holds a real file system, two generations of it in a repository,
# both looked at, copied, and given back to the host as a second VM.
#
# Run it by: make demo. It leaves nothing behind, however it ends.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$PWD/bin:$PATH:/usr/sbin:/sbin

# --- What has to be there ---------------------------------------------------

missing() {
	echo "demo: $1 is missing; install it with: apt-get install $2 (Debian, Ubuntu) or dnf install $2 (Fedora)" >&2
	exit 1
}
command -v hikae >/dev/null || { echo "demo: bin/hikae is missing; run: make demo" >&2; exit 1; }
command -v mke2fs >/dev/null || missing mke2fs e2fsprogs
command -v debugfs >/dev/null || missing debugfs e2fsprogs
[[ -e /dev/fuse ]] || { echo "demo: the kernel has no /dev/fuse; load it with: modprobe fuse" >&2; exit 1; }
if [[ $(id -u) != 0 ]]; then
	command -v fusermount3 >/dev/null || missing fusermount3 fuse3
	[[ -r /dev/fuse && -w /dev/fuse ]] || { echo "demo: /dev/fuse is closed to $(id -un); run as root: chmod 666 /dev/fuse" >&2; exit 1; }
fi

# --- How it shows what it does, and how it ends -----------------------------

bold='' plain=''
if [[ -t 1 ]]; then
	bold=$'\e[1m' plain=$'\e[0m'
fi
heading() { printf '\n%s%s%s\n' "$bold" "$*" "$plain"; }
# run shows a command as one would type it, then does it.
run() {
	local shown='' word
	for word in "$@"; do
		[[ $word != *' '* ]] || word="'$word'"
		shown+=" ${word#"$work/"}"
	done
	echo "\$$shown"
	(cd "$work" && "$@")
}
bytes() { numfmt --to=iec-i --suffix=B --format=%.1f "$1"; }

work=$(mktemp -d "${TMPDIR:-/tmp}/hikae-demo.XXXXXX")
sim=
finish() {
	local code=$?
	trap '' INT TERM
	if grep -qF " $work/guest " /proc/self/mounts; then
		umount "$work/guest" || true
	fi
	if grep -qF " $work/mnt " /proc/self/mounts; then
		hikae --quiet umount --lazy "$work/mnt" || true
	fi
	if [[ -n $sim ]]; then
		kill "$sim" 2>/dev/null || true
		wait "$sim" 2>/dev/null || true
	fi
	rm -rf "$work"
	((code == 0)) || echo "demo: failed" >&2
}
trap finish EXIT
trap 'exit 130' INT TERM

# Nothing of the user's own configuration takes part.
export XDG_CONFIG_HOME=$work/config XDG_STATE_HOME=$work/state
export HIKAE_REPO=$work/repository HIKAE_PASSPHRASE_FILE=$work/passphrase
umask 077
echo 'correct horse battery staple' >"$work/passphrase"
echo 'esx-secret' >"$work/password"

# --- The guest's disk -------------------------------------------------------

heading 'A VM: a 1 GiB disk with a partition table and an ext4 file system full of real files'
offset=1048576 # of the partition, in bytes
disk=$work/web01.raw
source=$(go env GOROOT)/src
mkdir -p "$work/files/srv"
cp -r "$source"/{bytes,compress,crypto,debug,encoding,fmt,go,html,image,math,net,os,runtime,strings,syscall,text,time,unicode,vendor} "$work/files/srv/"
echo 'the first state of this guest' >"$work/files/srv/state.txt"
truncate -s 1G "$disk"
if command -v sfdisk >/dev/null; then
	echo "start=$((offset / 512)), type=83" | sfdisk --quiet --label dos "$disk"
else
	# One entry of a DOS partition table: Linux, from sector 2048 to the end.
	printf '\0\0\0\0\x83\0\0\0\0\x08\0\0\0\xf8\x1f\0' | dd of="$disk" bs=1 seek=446 conv=notrunc status=none
	printf '\x55\xaa' | dd of="$disk" bs=1 seek=510 conv=notrunc status=none
fi
# mke2fs -d fills the file system without mounting it, so root is not needed.
mke2fs -q -t ext4 -L guest -E "offset=$offset" -d "$work/files" "$disk" "$(((1024 * 1024 * 1024 - offset) / 1024))k"
echo "$(find "$work/files" -type f | wc -l) files, $(bytes "$(($(stat -c %b "$disk") * 512))") of 1 GiB in use"
rm -r "$work/files"

# --- The host ---------------------------------------------------------------

heading 'A simulated ESXi host of the free edition runs it'
control=$work/control
mkdir "$work/datastore"
echo '$ esxisim serve --datastore datastore --user root --password-file password --free --ssh 127.0.0.1:0 --control control --vm web01=web01.raw &'
esxisim serve --datastore "$work/datastore" --user root --password-file "$work/password" \
	--free --ssh 127.0.0.1:0 --control "$control" --vm "web01=$disk" >"$work/sim.json" 2>"$work/sim.log" &
sim=$!
for _ in {1..600}; do
	[[ ! -s $work/sim.json ]] || break
	if ! kill -0 "$sim" 2>/dev/null; then
		cat "$work/sim.log" >&2
		exit 1
	fi
	sleep 0.1
done
# field NAME: a string of the JSON line that esxisim printed when it was ready.
field() { sed -n "s/.*\"$1\": *\"\([^\"]*\)\".*/\1/p" "$work/sim.json"; }
address=$(field address)
thumbprint=$(field thumbprint)
ssh=$(field ssh)
fingerprint=$(field ssh_fingerprint)
# folder_bytes: what the host has sent over HTTPS /folder.
folder_bytes() {
	esxisim stats --control "$control" | tr -d ' \n' | sed -n 's/.*"folder":{[^}]*"bytes_out":\([0-9]*\).*/\1/p'
}

heading 'A repository, and the host in the configuration'
run hikae init --quiet
run hikae host add esx1 --address "$address" --thumbprint "$thumbprint" --ssh "$ssh" --ssh-fingerprint "$fingerprint" \
	--user root --password-file password
run hikae host test esx1

# --- Two generations --------------------------------------------------------

heading 'The first backup reads what is allocated'
esxisim stats --control "$control" --reset >/dev/null
run hikae backup esx1/web01
first=$(folder_bytes)
echo "the host sent $(bytes "$first")"

heading 'The guest changes: a file is rewritten, one is new, one is gone'
changed=$work/changed.raw
cp --sparse=always "$disk" "$changed"
echo 'the second state of this guest' >"$work/state2.txt"
head -c 3000000 /dev/urandom >"$work/upload.bin"
debugfs -w -f - "$changed?offset=$offset" >/dev/null 2>&1 <<-COMMANDS
	rm /srv/state.txt
	write $work/state2.txt /srv/state.txt
	write $work/upload.bin /srv/upload.bin
	rm /srv/fmt/print.go
COMMANDS
run esxisim become --control control web01 0 changed.raw
esxisim stats --control "$control" --reset >/dev/null

heading 'The second backup reads what changed'
# Generations are named by the second.
sleep 1
run hikae backup esx1/web01
second=$(folder_bytes)
echo "the host sent $(bytes "$second") of a disk of 1 GiB (the first time $(bytes "$first"))"
if ((second * 4 > first)); then
	echo "demo: the second backup should have read much less" >&2
	exit 1
fi
run hikae generations
run hikae check --read-data

# --- Looking ----------------------------------------------------------------

heading 'The repository as a folder'
mkdir "$work/mnt" "$work/guest"
run hikae mount mnt
vm=$work/mnt/esx1/web01
run ls -lh mnt/esx1/web01 mnt/esx1/web01/latest/ mnt/esx1/web01/latest/partitions
mapfile -t generations < <(find "$vm" -mindepth 1 -maxdepth 1 -type d -printf '%f\n' | sort)
[[ ${#generations[@]} == 2 ]] || { echo "demo: there should be two generations" >&2; exit 1; }
# Reading through the same bytes twice would prove little: the guest's own disk
# is what they are compared with.
run cmp web01.raw "mnt/esx1/web01/${generations[0]}/web01-flat.vmdk"
run cmp changed.raw "mnt/esx1/web01/latest/web01-flat.vmdk"

heading "A file out of the guest's file system, in both generations"
# guest_file IMAGE: what /srv/state.txt says in the file system of that partition.
guest_file() {
	if [[ $(id -u) == 0 ]] && mount -o ro,noload,loop "$work/$1" "$work/guest" 2>/dev/null; then
		echo "\$ mount -o ro,noload,loop $1 guest; cat guest/srv/state.txt; umount guest"
		cat "$work/guest/srv/state.txt"
		umount "$work/guest"
	else
		# Loop mounts need root and loop devices; debugfs reads ext4 without either.
		run debugfs -R 'cat /srv/state.txt' "$1" 2>/dev/null
	fi
}
for g in "${generations[@]}"; do
	guest_file "mnt/esx1/web01/$g/partitions/web01-p1.img" | tee "$work/out"
	said=$(tail -n 1 "$work/out")
	case $g in
	"${generations[0]}") [[ $said == 'the first state of this guest' ]] ;;
	*) [[ $said == 'the second state of this guest' ]] ;;
	esac
done

# --- Having it back ---------------------------------------------------------

heading 'A copy of the second generation, holes kept'
run hikae copy esx1/web01@latest copy
run du -h --apparent-size copy/web01-flat.vmdk
run du -h copy/web01-flat.vmdk
run cmp changed.raw copy/web01-flat.vmdk

heading 'The first generation goes back to the host as a second VM and is started'
run hikae restore "esx1/web01@${generations[0]}" --to esx1 --datastore datastore1 --name web01-before --power-on
run hikae vms esx1
echo '$ esxisim read --control control web01-before 0 | cmp - web01.raw'
esxisim read --control "$control" web01-before 0 | cmp - "$disk"
run hikae umount mnt

heading 'demo: ok'

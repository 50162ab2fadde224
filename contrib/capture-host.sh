#!/bin/sh
# shellcheck disable=SC2016 # what is in single quotes is meant for the host's shell
# Gathers what a real ESXi host prints, so that hikae's parsers can be tested with it.
#
#   contrib/capture-host.sh [-u USER] HOST [VM-ID ...] > capture.txt
#
# It changes nothing on the host: no snapshot, no file, no setting. It needs ssh, curl,
# awk and od here, and SSH switched on there. ssh and curl ask for the password by
# themselves (ssh once, curl once); it is never kept. Without VM-IDs the first three VMs
# are looked at (`vim-cmd vmsvc/getallvms` on the host lists the ids).
#
# Names of VMs, datastores and the host, UUIDs, addresses and licence keys are replaced:
# the same one by the same word everywhere, so that the output still fits together.
# Comments inside VMs' annotations and the contents of disks are not asked for. Look
# through the file before you send it to anybody.
set -eu
user=root
while getopts u: opt; do
	case $opt in
	u) user=$OPTARG ;;
	*) exit 2 ;;
	esac
done
shift $((OPTIND - 1))
if [ $# -lt 1 ]; then
	echo "usage: $0 [-u USER] HOST [VM-ID ...]" >&2
	exit 2
fi
host=$1         # with :PORT where HTTPS is not on 443
name=${host%%:*} # for ssh, whose port and key SSH_OPTIONS can give: "-p 2222 -i key"
shift
for id; do
	case $id in
	*[!0-9]* | "")
		echo "capture-host: $id is not the id of a VM: a number, as vim-cmd vmsvc/getallvms lists them" >&2
		exit 2
		;;
	esac
done
for tool in ssh curl awk od; do
	command -v "$tool" >/dev/null || {
		echo "capture-host: $tool is not installed here; install it and run this again" >&2
		exit 1
	}
done

work=$(mktemp -d)
# One connection for everything: the password is asked for once, and a host counts few.
trap 'ssh -o ControlPath="$work/ssh" -O exit "$user@$name" 2>/dev/null || true; rm -rf "$work"' EXIT
trap 'exit 130' INT TERM

# shellcheck disable=SC2086
ssh -o ControlMaster=yes -o ControlPath="$work/ssh" -o ControlPersist=600 ${SSH_OPTIONS:-} "$user@$name" true ||
	{
		echo "capture-host: cannot log in to $host by SSH as $user; switch it on there (Host > Actions > Services)" >&2
		exit 1
	}

# on runs a script on the host.
on() {
	# shellcheck disable=SC2086
	ssh -o ControlPath="$work/ssh" ${SSH_OPTIONS:-} "$user@$name" "$1" </dev/null 2>&1
}

# show runs a command on the host and shows what it prints, at most 400 lines of it.
show() {
	printf '\n### %s\n' "$1"
	code=0
	on "$1" >"$work/out" || code=$?
	sed -n '1,400p' "$work/out"
	lines=$(wc -l <"$work/out")
	[ "$lines" -le 400 ] || printf '### … %s lines in all\n' "$lines"
	printf '### exit %s\n' "$code"
}

# quoted makes a word of the shell of anything.
quoted() { printf "'%s'" "$(printf %s "$1" | sed "s/'/'\\\\''/g")"; }

# folder is the web address of a datastore path "[ds] dir/file".
folder() {
	printf '%s' "$1" | awk -v host="$host" '{
		ds = $0; sub(/^\[/, "", ds); sub(/\].*/, "", ds)
		path = $0; sub(/^\[[^]]*\] */, "", path)
		print "https://" host "/folder/" esc(path, 1) "?dcPath=ha-datacenter&dsName=" esc(ds, 0)
	}
	function esc(s, slash,   i, c, out) {
		for (i = 1; i <= length(s); i++) {
			c = substr(s, i, 1)
			if (c ~ /[A-Za-z0-9._-]/ || slash && c == "/") out = out c
			else out = out sprintf("%%%02X", ord[c])
		}
		return out
	}
	BEGIN { for (i = 1; i < 256; i++) ord[sprintf("%c", i)] = i }'
}

capture() {
	printf '# hikae host capture, format 1\n'
	show 'vmware -vl'
	show 'uname -a'
	show 'esxcli system version get'
	show 'date -u; date'
	show 'vim-cmd vimsvc/license --show'
	show 'for t in awk base64 busybox cat cksum cp cut date dd df du esxcli find grep gzip head hexdump hostname kill ls lsof md5sum mkdir mv nc nohup od openssl python python3 readlink rm sed setsid sha1sum sha256sum sort stat tail tar test timeout touch tr truncate uname vim-cmd vmdumper vmkfstools vmware wc wget which xxd zcat; do printf "%s: " $t; which $t || echo none; done'
	show 'busybox | head -3; dd --help; stat --help; ls --help | head -5'
	show 'vmkfstools --help'
	show 'vim-cmd vmsvc; vim-cmd solo; vim-cmd vimsvc'
	show 'grep -iE "^(MaxSessions|MaxStartups|Ciphers|KexAlgorithms|MACs|HostKey|FipsMode|PasswordAuthentication|ChallengeResponse|KbdInteractive|ClientAlive|Subsystem)" /etc/ssh/sshd_config; ssh -V'
	show 'esxcli system settings advanced list -o /Security/AccountLockFailures; esxcli system settings advanced list -o /Security/AccountUnlockTime; esxcli system settings advanced list -o /UserVars/ESXiShellInteractiveTimeOut'
	show 'esxcli storage filesystem list; esxcli --formatter=csv storage filesystem list; df'
	show 'ls -la /vmfs/volumes/'
	show 'for d in /vmfs/volumes/*; do [ -h "$d" ] && vmkfstools -Ph "$d"; done'
	show 'vim-cmd vmsvc/getallvms'
	show 'esxcli vm process list'
	show 'vim-cmd vimsvc/task_list'
	# What fails, and with which exit code.
	show 'vim-cmd vmsvc/power.getstate 999999'
	show 'vim-cmd vmsvc/snapshot.remove 999999 1'
	show 'vim-cmd vmsvc/nosuchcommand'
	show 'nosuchcommand'

	for id; do
		for sub in get.summary get.config get.filelayout get.snapshotinfo snapshot.get device.getdevices get.datastores get.guest get.tasklist power.getstate message; do
			show "vim-cmd vmsvc/$sub $id"
		done
		vmx=$(on "vim-cmd vmsvc/get.summary $id" | sed -n 's/^ *vmPathName = "\(.*\)",* *$/\1/p' | head -1)
		[ -n "$vmx" ] || continue
		dir=$(printf %s "$vmx" | sed 's|^\[\(.*\)\] *|/vmfs/volumes/\1/|; s|/[^/]*$||')
		q=$(quoted "$dir")
		show "ls -la $q"
		show "cd $q && grep -iE '^(config.version|virtualHW|ctkEnabled|(scsi|sata|nvme|ide)[0-9:]*\\.|uuid|vc.uuid|nvram|guestOS|snapshot|sched|disk)' *.vmx"
		show "cd $q && for f in *.vmdk; do case \$f in *-flat.vmdk|*-delta.vmdk|*-sesparse.vmdk|*-ctk.vmdk|*-rdm*) continue;; esac; echo \"== \$f\"; cat \"\$f\"; done"
		show "cd $q && for f in *.vmdk; do case \$f in *-flat.vmdk|*-delta.vmdk|*-sesparse.vmdk|*-ctk.vmdk|*-rdm*) continue;; esac; echo \"== \$f\"; vmkfstools -t0 \"\$f\" | head -40; echo ...; vmkfstools -t0 \"\$f\" | sed 's/^.*\\(NOMP\\|VMFS\\)/\\1/; s/LVID.*//' | sort | uniq -c; vmkfstools -D \"\$f\" | head -20; done"
		show "cd $q && for f in *-flat.vmdk *-delta.vmdk *-sesparse.vmdk; do [ -e \"\$f\" ] && { echo \"== \$f\"; dd if=\"\$f\" of=/dev/null bs=512 count=1; }; done"
		tracking "$dir"
		web "$vmx"
		on "cd $q && ls" | grep -- '-flat\.vmdk$' | head -2 >"$work/flats" || true
		while read -r flat; do
			web "$(printf %s "$vmx" | sed 's|/[^/]*$||')/$flat"
		done <"$work/flats"
	done
	printf '\n### GET /sdk/vimServiceVersions.xml\n'
	curl -sk "https://$host/sdk/vimServiceVersions.xml" || true
	printf '\n### end\n'
}

# tracking says of each change tracking file what its layout is thought to be, without
# its bytes: the header's fields, and whether they agree with the change id.
tracking() {
	on "cd $(quoted "$1") && ls" | grep -- '-ctk\.vmdk$' >"$work/ctks" || true
	while read -r file; do
		printf '\n### change tracking file %s\n' "$file"
		if ! on "cat $(quoted "$1/$file")" >"$work/ctk"; then
			printf 'cannot be read: '
			head -c 200 "$work/ctk"
			printf '\n'
			continue
		fi
		printf 'bytes: %s\n' "$(wc -c <"$work/ctk")"
		printf 'header, as u32: '
		head -c 44 "$work/ctk" | od -An -v -tu4 -w44
		printf 'identity at 44, replaced as in change ids: '
		tail -c +45 "$work/ctk" | head -c 16 | od -An -v -tx1 -w16
		printf 'header from 60, bytes that are not zero: '
		tail -c +61 "$work/ctk" | head -c 452 | od -An -v -tx1 -w1 | grep -vc '00' || true
		tail -c +513 "$work/ctk" | od -An -v -tu4 -w4 | sort -n | uniq -c |
			awk '{ if (NR <= 10) print "entries of " $2 ": " $1; last = $2; n++ } END { print "different values: " n ", the highest: " last }'
	done <"$work/ctks"
}

# web asks the file server for a file's head and for its first bytes.
web() {
	url=$(folder "$1")
	for args in "-I" "-r 0-99" "-r 512-" "-r 999999999999999-"; do
		printf '\n### curl %s %s\n' "$args" "$url"
		# shellcheck disable=SC2086
		curl -sk --max-time 20 -K "$work/login" $args -D "$work/head" -o /dev/null --max-filesize 1048576 "$url" || printf 'curl: exit %s\n' "$?"
		tr -d '\r' <"$work/head" | sed 's/^\([Ss]et-[Cc]ookie\|[Ww][Ww][Ww]-[A-Za-z-]*\):.*/\1: (left out)/'
		: >"$work/head"
	done
}

# anonymous replaces what names things. $1 lists names, one a line.
anonymous() {
	LC_ALL=C awk -v names="$1" -v host="$host" '
	BEGIN {
		while ((getline line <names) > 0) {
			split(line, f, "\t")
			if (length(f[2]) == 0 || f[2] in word) continue
			new = f[1] (++count[f[1]])
			know(f[2], new)
			shell = f[2]; gsub(/\047/, "\047\\\\\047\047", shell); know(shell, new) # as words for the shell
			web = f[2]; gsub(/%/, "%25", web); gsub(/ /, "%20", web); gsub(/\047/, "%27", web); know(web, new)
		}
		for (i = 1; i < n; i++) for (j = i + 1; j <= n; j++)  # longer names first
			if (length(order[j]) > length(order[i])) { t = order[i]; order[i] = order[j]; order[j] = t }
	}
	function know(name, new) { if (!(name in word)) { word[name] = new; order[++n] = name } }
	# Only where no letter or digit stands beside it, for a VM may be called "a".
	function swap(s, from, to,   out, at, before, whole) {
		while ((at = index(s, from)) > 0) {
			before = substr(" " out s, length(out) + at, 1)
			whole = before !~ /[A-Za-z0-9]/ && substr(s, at + length(from), 1) !~ /[A-Za-z0-9]/
			out = out substr(s, 1, at - 1) (whole ? to : from); s = substr(s, at + length(from))
		}
		return out s
	}
	function each(s, re, kind,   out, m) {
		while (match(s, re)) {
			m = substr(s, RSTART, RLENGTH)
			if (!((kind, m) in seen)) seen[kind, m] = ++many[kind]
			out = out substr(s, 1, RSTART - 1) fake(kind, m, seen[kind, m]); s = substr(s, RSTART + RLENGTH)
		}
		return out s
	}
	# The same shape: each hexadecimal digit is one, the last eight are a number.
	function fake(kind, m, k,   i, c, out, left, hex) {
		if (kind == "ip") return "192.0.2." (k % 250)
		if (kind == "key") return "00000-00000-00000-00000-00000"
		hex = sprintf("%08x", k); left = 0
		for (i = length(m); i > 0; i--) {
			c = substr(m, i, 1)
			if (c ~ /[0-9A-Fa-f]/) { out = (left < 8 ? substr(hex, 8 - left, 1) : "a") out; left++ } else out = c out
		}
		return out
	}
	{
		s = $0
		if (s ~ /^ *annotation = |^ *notes = /) s = substr(s, 1, index(s, "=")) " (left out),"
		for (i = 1; i <= n; i++) s = swap(s, order[i], word[order[i]])
		gsub(/[0-9A-Z][0-9A-Z][0-9A-Z][0-9A-Z][0-9A-Z](-[0-9A-Z][0-9A-Z][0-9A-Z][0-9A-Z][0-9A-Z])+/, "00000-00000-00000-00000-00000", s)
		h = "[0-9A-Fa-f]"; h2 = h h; h4 = h2 h2; h8 = h4 h4
		s = each(s, h8 "-" h4 "-" h4 "-" h4 "-" h8 h4, "uuid")
		s = each(s, h8 "-" h8 "-" h4 "-" h8 h4, "volume")
		s = each(s, h2 " " h2 " " h2 " " h2 " " h2 " " h2 " " h2 " " h2 "[ -]" h2 " " h2 " " h2 " " h2 " " h2 " " h2 " " h2 " " h2, "identity")
		s = each(s, h2 ":" h2 ":" h2 ":" h2 ":" h2 ":" h2, "mac")
		s = each(s, "[0-9][0-9]?[0-9]?\\.[0-9][0-9]?[0-9]?\\.[0-9][0-9]?[0-9]?\\.[0-9][0-9]?[0-9]?", "ip")
		print s
	}'
}

if [ $# -eq 0 ]; then
	# shellcheck disable=SC2046
	set -- $(on 'vim-cmd vmsvc/getallvms' | awk '$1 ~ /^[0-9]+$/ { print $1; if (++n == 3) exit }')
fi
{
	on 'vim-cmd vmsvc/getallvms' | awk '$1 ~ /^[0-9]+$/ && (at = index($0, " [")) {
		s = substr($0, 1, at - 1); sub(/^[0-9]+ +/, "", s); sub(/ +$/, "", s); print "vm\t" s
		p = substr($0, at + 1); sub(/^\[[^]]*\] */, "", p); sub(/\/.*/, "", p); print "vm\t" p
	}'
	on 'for d in /vmfs/volumes/*; do [ -h "$d" ] && echo "${d##*/}"; done' | awk '{ print "ds\t" $0 }'
	on 'hostname; hostname -s' | awk '{ print "host\t" $0 }'
	printf 'host\t%s\n' "$name"
	on 'vim-cmd vmsvc/getallvms | while read -r id rest; do case $id in *[!0-9]*|"") ;; *) vim-cmd vmsvc/get.guest $id | grep -i "hostName = \"";; esac; done' |
		sed -n 's/.*hostName = "\(.*\)".*/\1/p' | awk '{ print "guest\t" $0 }'
} >"$work/names"

# curl reads the password from a file that only we can read.
umask 077
if [ -n "${CAPTURE_PASSWORD_FILE:-}" ]; then
	IFS= read -r password <"$CAPTURE_PASSWORD_FILE" || true
else
	printf 'Password of %s@%s for HTTPS (empty: leave that out): ' "$user" "$host" >&2
	stty -echo 2>/dev/null </dev/tty || true
	IFS= read -r password </dev/tty || password=
	stty echo 2>/dev/null </dev/tty || true
	echo >&2
fi
printf 'user = "%s:%s"\n' "$user" "$(printf %s "$password" | sed 's/[\\"]/\\&/g')" >"$work/login"
password=

capture "$@" | anonymous "$work/names"

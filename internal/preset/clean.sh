set -eu
root=$1

# What belongs to one machine: each makes its own ID and is told its name and name servers.
: >"$root/etc/machine-id"
rm -f "$root/var/lib/dbus/machine-id" "$root/etc/hostname" "$root/etc/resolv.conf"
: >"$root/etc/resolv.conf"

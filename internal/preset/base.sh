set -eu
# Where standard output goes to, the tar goes to.
exec >&2
root=$1

chroot "$root" useradd --uid 1000 --user-group --create-home --shell /bin/bash shed
echo 'shed ALL=(ALL:ALL) NOPASSWD: ALL' >"$root/etc/sudoers.d/shed"
chmod 0440 "$root/etc/sudoers.d/shed"

mkdir -p "$root/etc/default" "$root/etc/systemd/system"
echo 'LANG=C.UTF-8' >"$root/etc/default/locale"
ln -sf /lib/systemd/system/multi-user.target "$root/etc/systemd/system/default.target"
# There is nobody at these terminals, and these timers have nothing to do here.
for unit in getty@tty1.service serial-getty@ttyS0.service e2scrub_reap.service \
	apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer; do
	ln -sf /dev/null "$root/etc/systemd/system/$unit"
done

# A journal file is allocated whole, 8 MB at first and one more for each user: that would be
# most of what a new machine's disk takes.
mkdir -p "$root/etc/systemd/journald.conf.d"
cat >"$root/etc/systemd/journald.conf.d/shed.conf" <<END
[Journal]
SystemMaxFileSize=1M
SystemMaxUse=64M
SplitMode=none
END

# Docker starts when it is first used: a shed that doesn't use it has nothing to wait for.
chroot "$root" usermod --append --groups docker shed
chroot "$root" systemctl disable docker.service containerd.service
chroot "$root" systemctl enable docker.socket
# What container engines keep can't be on an overlay: the guest puts other directories over these, if they are there.
install -d -m 0711 "$root/var/lib/docker" "$root/var/lib/containerd"
install -d -m 0755 "$root/var/lib/containers"

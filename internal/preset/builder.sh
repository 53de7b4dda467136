set -eu
# What buildah keeps can't be on an overlay.
mkdir -p "$1/var/lib/containers"

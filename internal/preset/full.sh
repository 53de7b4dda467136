set -eu
# Where standard output goes to, the tar goes to.
exec >&2
root=$1
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp
modules=$root/usr/local/lib/node_modules

apt() {
	# The tree is packed or thrown away: nothing of it has to be on disk.
	chroot "$root" apt-get -o DPkg::Options::=--force-unsafe-io --yes --no-install-recommends -qq "$@" >/dev/null
}

npm() {
	chroot "$root" npm install --global --prefix /usr/local --no-audit --no-fund --no-update-notifier "$@"
}

echo 'shed: installing Python'
apt install python3 python3-pip python3-venv

# The package node has no npm in it: the distribution's installs both, and goes again. It is older
# than what npm demands of Node, hence --force. 24 is a release with long-term support, and 11 the npm that belongs to it.
echo 'shed: installing Node'
apt install npm
npm --force node@24 npm@11
# npm would take the directory that Node is in for the prefix.
echo 'prefix=/usr/local' >"$modules/npm/npmrc"

# @latest, since npm else takes an older version that declares support for an older Node.
echo 'shed: installing Claude Code, OpenCode and Codex'
npm --allow-scripts=@anthropic-ai/claude-code,opencode-ai \
	@anthropic-ai/claude-code@latest opencode-ai@latest @openai/codex@latest

# OpenCode's installer chooses by the processor of the machine that builds; the image must run on any.
opencode=$(chroot "$root" readlink -f /usr/local/bin/opencode)
baseline=$modules/opencode-ai/node_modules/opencode-linux-x64-baseline
if [ -d "$baseline" ]; then
	ln -f "$baseline/bin/opencode" "$root$opencode"
	rm -rf "$modules/opencode-ai/node_modules/opencode-linux-x64"
fi

echo 'shed: removing what was needed to install them'
apt purge --autoremove npm nodejs
# These name the registry that the packages came from.
find "$modules" -name .package-lock.json -delete

echo 'shed: trying them out'
for program in node npm npx claude opencode codex; do
	chroot --userspec=1000:1000 "$root" env -i PATH="$PATH" HOME=/tmp "$program" --version >/dev/null
done

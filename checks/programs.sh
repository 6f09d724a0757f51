#!/bin/sh
# Installs Debian packages where they are missing and we may; without them, what needs them skips and says so.
#   sh checks/programs.sh PACKAGE=WHAT_IT_BRINGS ...   (a program on PATH, or a path)
set -u

PATH="$PATH:/usr/sbin:/usr/local/sbin"

missing=""
for pair in "$@"; do
    brings="${pair#*=}"
    command -v "$brings" >/dev/null || [ -e "$brings" ] || missing="$missing ${pair%%=*}"
done
[ -n "$missing" ] || exit 0

skip() {
    echo "missing:$missing; $1: what needs them will be skipped"
    exit 0
}

command -v apt-get >/dev/null || skip "there is no apt-get"
if [ "$(id -u)" = 0 ]; then
    as_root=""
elif sudo -n true 2>/dev/null; then
    as_root="sudo -n"
else
    skip "there is no right to install"
fi
echo "installing$missing"
export DEBIAN_FRONTEND=noninteractive
apt() { timeout 600 $as_root apt-get -qq -o Dpkg::Use-Pty=0 "$@" </dev/null >/dev/null 2>&1; }
# shellcheck disable=SC2086  # one word a package
apt install -y --no-install-recommends $missing || { apt update && apt install -y --no-install-recommends $missing; } ||
    skip "apt-get could not install them"

#!/bin/sh
# Installs Mosquitto from Debian where it is missing and we may; without it the tests that need it skip.
set -u

PATH="$PATH:/usr/sbin:/usr/local/sbin"
command -v mosquitto >/dev/null && exit 0

skip() {
    echo "mosquitto is missing and $1: tests with a real Mosquitto will be skipped"
    exit 0
}

command -v apt-get >/dev/null || skip "there is no apt-get"
if [ "$(id -u)" = 0 ]; then
    as_root=""
elif sudo -n true 2>/dev/null; then
    as_root="sudo -n"
else
    skip "there is no right to install it"
fi
echo "installing mosquitto"
export DEBIAN_FRONTEND=noninteractive
apt() { timeout 300 $as_root apt-get -qq -o Dpkg::Use-Pty=0 "$@" </dev/null >/dev/null 2>&1; }
apt install -y --no-install-recommends mosquitto || { apt update && apt install -y --no-install-recommends mosquitto; } ||
    skip "apt-get could not install it"

# Sourced by the scripts beside it: installing Debian packages.

# install_packages PACKAGE...: installs those that are missing; ends the script with 2 where that is not possible.
install_packages() {
  local package missing=() as_root=()
  if ! command -v dpkg-query >/dev/null; then
    printf '== no dpkg here: this script is for Debian and Ubuntu; install the like of: %s\n' "$*" >&2
    exit 2
  fi
  for package in "$@"; do
    [ "$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || { printf '== as root, run: apt-get install %s\n' "${missing[*]}" >&2; exit 2; }
    as_root=(sudo)
  fi
  printf '== apt-get install %s\n' "${missing[*]}" >&2
  "${as_root[@]}" apt-get update -qq
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >&2
}

#!/usr/bin/env bash
# A private CA, a server certificate and a certificate a client, for mutual TLS; needs openssl.
#   ./make_certs.sh certs fl.hospital.example client001 client002 client003
#   DAYS=90 ./make_certs.sh certs 192.0.2.7 client001                       the CA holds ten times as long
#   ./make_certs.sh certs fl.hospital.example client004                     a client more, by the CA that is there
# To renew certificates, move them and their keys out of DIR (not ca.*), and give their clients' names again.
# To a hospital go ca.pem and its own client00K.pem and .key; ca.key leaves the machine that it was made on for no one.
set -euo pipefail
umask 077

fail() { echo "make_certs: error: $*" >&2; exit "${code:-1}"; }
[ $# -ge 3 ] || code=2 fail "usage: ./make_certs.sh DIR HOSTNAME CLIENT..., HOSTNAME as clients will call the server"
command -v openssl > /dev/null || fail "openssl is missing; on Debian: apt-get install openssl"
dir=$1 host=$2 days=${DAYS:-365}
shift 2
[[ $host =~ ^[A-Za-z0-9.:-]+$ ]] || code=2 fail "HOSTNAME '$host' is neither a host's name nor its address"
[[ $host != *:* || $host == *:*:* ]] || code=2 fail "HOSTNAME '$host' is a host without its port"
[[ $days =~ ^[1-9][0-9]{0,3}$ ]] || code=2 fail "DAYS=$days is not a number of days"
for name in "$@"; do
    [[ $name =~ ^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$ && $name != ca && $name != server ]] || code=2 fail "client name '$name' is refused"
    [ ! -e "$dir/$name.key" ] && [ ! -e "$dir/$name.pem" ] || fail "$dir/$name.key or .pem is there already: nothing is overwritten"
done
mkdir -p "$dir"
new="-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes"

sign() { # NAME SAN USAGE
    openssl req -new $new -keyout "$dir/$1.key" -subj "/CN=${1:0:64}" 2> /dev/null |
        openssl x509 -req -CA "$dir/ca.pem" -CAkey "$dir/ca.key" -set_serial "0x$(openssl rand -hex 16)" -days "$days" -sha256 \
            -extfile <(printf '%s\n' "subjectAltName=$2" "extendedKeyUsage=$3" basicConstraints=critical,CA:FALSE \
                keyUsage=critical,digitalSignature) -out "$dir/$1.pem" 2> /dev/null || fail "openssl could not make $dir/$1.pem"
}

if [ ! -e "$dir/ca.key" ]; then
    [ ! -e "$dir/ca.pem" ] && [ ! -e "$dir/server.pem" ] || fail "$dir holds certificates, but not the CA's key: choose another DIR"
    openssl req -x509 $new -keyout "$dir/ca.key" -out "$dir/ca.pem" -days $((10 * days)) -sha256 \
        -subj "/CN=private CA of $host" -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign 2> /dev/null
fi
if [ ! -e "$dir/server.pem" ]; then
    if [[ $host =~ ^[0-9.]+$ || $host == *:* ]]; then san=IP:$host; else san=DNS:$host; fi
    sign server "$san,DNS:localhost" serverAuth
fi
for name in "$@"; do sign "$name" "DNS:$name" clientAuth; done
for name in ca server "$@"; do
    echo "make_certs: $dir/$name.pem holds until $(openssl x509 -in "$dir/$name.pem" -noout -enddate | cut -d= -f2)"
done

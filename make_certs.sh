#!/usr/bin/env bash
# A private CA, a server certificate and one certificate for each client, for mutual TLS. Needs openssl.
#   ./make_certs.sh certs fl.hospital.example client001 client002 client003
#   DAYS=90 ./make_certs.sh certs 192.0.2.7 client001     the CA is valid ten times as long
#   ./make_certs.sh certs fl.hospital.example client004   one more client, signed by the CA in certs
# To renew certificates, move them and their keys out of DIR (not ca.*), and run it with the same names.
# A hospital gets ca.pem and its own client00K.pem and client00K.key. ca.key stays where it was made.
set -euo pipefail
umask 077

fail() { # EXIT-CODE SENTENCE
    echo "make_certs: error: $2" >&2
    exit "$1"
}

case ${1:-} in
-h | --help)
    sed -n '2,7s/^# //p' "$0"
    exit 0
    ;;
esac
[ $# -ge 3 ] ||
    fail 2 "usage: ./make_certs.sh DIR HOSTNAME CLIENT..., HOSTNAME as clients will call the server"
command -v openssl > /dev/null || fail 1 "openssl is missing; on Debian: apt-get install openssl"
dir=$1
host=$2
days=${DAYS:-365}
shift 2
[[ $host =~ ^[A-Za-z0-9.:-]+$ ]] || fail 2 "HOSTNAME '$host' is neither a host's name nor its address"
[[ $host != *:* || $host == *:*:* ]] || fail 2 "HOSTNAME '$host' is a host without its port"
[[ $days =~ ^[1-9][0-9]{0,3}$ ]] || fail 2 "DAYS=$days is not a number of days"
for name in "$@"; do
    # ca and server name files of their own here
    [[ $name =~ ^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$ && $name != ca && $name != server ]] ||
        fail 2 "client name '$name' is refused: expected letters, digits, '.', '_', '-', not ca or server"
    [ ! -e "$dir/$name.key" ] && [ ! -e "$dir/$name.pem" ] ||
        fail 1 "$dir/$name.key or .pem is there already: nothing is overwritten"
done
mkdir -p "$dir"
new_key="-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes"

sign() { # NAME SUBJECT-ALTERNATIVE-NAMES USAGE
    local extensions
    extensions=$(printf '%s\n' "subjectAltName=$2" "extendedKeyUsage=$3" \
        basicConstraints=critical,CA:FALSE keyUsage=critical,digitalSignature)
    # A common name has at most 64 characters; who is who is decided by the alternative names.
    openssl req -new $new_key -keyout "$dir/$1.key" -subj "/CN=${1:0:64}" 2> /dev/null |
        openssl x509 -req -CA "$dir/ca.pem" -CAkey "$dir/ca.key" \
            -set_serial "0x$(openssl rand -hex 16)" -days "$days" -sha256 \
            -extfile <(echo "$extensions") -out "$dir/$1.pem" 2> /dev/null ||
        fail 1 "openssl could not make $dir/$1.pem"
}

if [ ! -e "$dir/ca.key" ]; then
    [ ! -e "$dir/ca.pem" ] && [ ! -e "$dir/server.pem" ] ||
        fail 1 "$dir holds certificates, but not the CA's key: choose another DIR"
    openssl req -x509 $new_key -keyout "$dir/ca.key" -out "$dir/ca.pem" -days $((10 * days)) -sha256 \
        -subj "/CN=private CA of $host" -addext basicConstraints=critical,CA:TRUE \
        -addext keyUsage=critical,keyCertSign 2> /dev/null ||
        fail 1 "openssl could not make $dir/ca.pem"
fi
if [ ! -e "$dir/server.pem" ]; then
    if [[ $host =~ ^[0-9.]+$ || $host == *:* ]]; then
        names=IP:$host
    else
        names=DNS:$host
    fi
    sign server "$names,DNS:localhost" serverAuth
fi
for name in "$@"; do
    sign "$name" "DNS:$name" clientAuth
done
for name in ca server "$@"; do
    ends=$(openssl x509 -in "$dir/$name.pem" -noout -enddate | cut -d= -f2)
    echo "make_certs: $dir/$name.pem is valid until $ends"
done

#!/usr/bin/env bash
# Is federation worth it? Central, federated on an IID and on a non-IID split, and the largest client alone.
#   ./compare.sh                          14 rounds on drawn images
#   ./compare.sh --help                   all flags
exec python3 "$(dirname "$0")/launch.py" compare "$@"

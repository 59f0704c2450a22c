#!/usr/bin/env bash
# Is federation worth it? Central, federated and alone, with the same number of passes over the images.
#   ./compare.sh                          ten rounds on the drawn hospitals
#   ./compare.sh --help                   all flags
exec python3 "$(dirname "$0")/launch.py" compare "$@"

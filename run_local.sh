#!/usr/bin/env bash
# The whole demo on this machine: packages, images, one server, its clients, the result.
#   ./run_local.sh                        ten rounds on synthetic images
#   ./run_local.sh --help                 all flags
exec python3 "$(dirname "$0")/launch.py" "$@"

#!/usr/bin/env bash
# The whole demo on this machine: set-up, data, one server, its clients, the result.
#   ./run_local.sh                        ten rounds on drawn images
#   ./run_local.sh --help                 all flags
exec python3 "$(dirname "$0")/launch.py" run "$@"

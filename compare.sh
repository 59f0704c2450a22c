#!/usr/bin/env bash
# Is federation worth it? As run_local.sh, and beside it one model of all images in one place.
exec bash "$(dirname "$0")/run_local.sh" --central "$@"

#!/usr/bin/env bash
# From nothing to a learned compression decision: environment, install, the
# whole pipeline on the demo model. The last line on stdout is its JSON.
# Flags given here override configs/demo.cfg.
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
install demo
python -m toga_jax --flagfile=configs/demo.cfg "$@"

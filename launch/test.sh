#!/usr/bin/env bash
# Installs what the tests need and runs them; arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
install demo,test
python -m pytest "$@"

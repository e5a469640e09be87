#!/bin/sh
# Unpack the newest wheel of folder $2 into an empty folder and run from there with the interpreter $1:
# what a pip user gets must work with no checkout, no network and no data folder, and stay small.
set -eu
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
wheel=$(ls -t "$2"/*.whl | head -n 1)
size=$(wc -c < "$wheel")
[ "$size" -lt 53000000 ] || { echo "the wheel has $size bytes, the limit is 53000000"; exit 1; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m zipfile -e "$wheel" "$folder"
cd "$folder"
env -u UNLEARN_GYM_DATA_ROOT PYTHONPATH="$folder" PYTHONSAFEPATH=1 "$python" - "$folder" <<'PY'
import sys

import gymnasium as gym

import unlearn_gym
from unlearn_gym.policies.episode import policy_context, run_episode
from unlearn_gym.policies import make_policy

assert unlearn_gym.__file__.startswith(sys.argv[1]), unlearn_gym.__file__
for task in ("gaussians-2d", "mnist-digits:1,3,7", "mnist-sandals", "mnist-tshirt", "mnist-trousers"):
    env = gym.make("SISSUnlearn-v0", task=task, horizon=3).unwrapped
    env.task.oracle_model()
    episode = run_episode(env, make_policy("variational:pathwise", policy_context(env)), seed=0)
    assert len(episode.trace["lambda_"]) == 3
make_policy("ppo", policy_context(env))
PY
echo "wheel of $size bytes works away from the checkout"

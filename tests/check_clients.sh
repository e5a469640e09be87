#!/bin/sh
# Other people's clients against this checkout, with the package's interpreter $1: each in a virtual environment of its
# own on top of that one, as RL Baselines3 Zoo, TorchRL and RLlib want versions of their own. Needs a package registry.
set -eu
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
root=$(cd "$(dirname "$0")/.." && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

client() {  # NAME PACKAGE...: an environment that sees the package's own packages, too
    name=$1; shift
    "$python" -m venv "$folder/$name"
    "$python" -c 'import site; print(site.getsitepackages()[0])' > "$(echo "$folder/$name"/lib/python3*/site-packages)/base.pth"
    "$folder/$name/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
}

export PYTHONPATH="$root"
cd "$folder"
client zoo rl_zoo3
for algorithm in ppo a2c sac td3 ppo_lstm; do
    "$folder/zoo/bin/python" -m rl_zoo3.train --algo "$algorithm" --env SISSUnlearn-v0 --gym-packages unlearn_gym \
        --conf-file "$root/configs/agents/$algorithm.yml" --env-kwargs "task:'gaussians-2d'" --n-timesteps 960 \
        --eval-freq -1 --log-folder zoo > "zoo-$algorithm.log" 2>&1 || { cat "zoo-$algorithm.log"; exit 1; }
    "$python" -m agents.enjoy "zoo/$algorithm/SISSUnlearn-v0_1/SISSUnlearn-v0.zip" --task gaussians-2d --frame-every 30 --out seen
done
"$python" "$root/examples/cleanrl_ppo.py" --total-timesteps 960 --out cleanrl
client torchrl torchrl
"$folder/torchrl/bin/python" "$root/examples/torchrl_env.py"
client rllib "ray[rllib]"
"$folder/rllib/bin/python" "$root/examples/rllib_ppo.py"
for name in zoo torchrl rllib; do
    "$folder/$name/bin/python" -m pip list --disable-pip-version-check 2>/dev/null | grep -iE '^(rl_zoo3|torchrl|tensordict|ray|gymnasium|stable_baselines3|torch) ' | tr -s ' ' | tr '\n' ';'
    echo " in $name"
done
echo "all four clients ran"

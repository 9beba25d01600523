"""`jepa_world.envs`: gymnasium environments on MuJoCo. One file a component; named in jepa_world/registry.py."""

if __name__ != "jepa_world.envs":
    raise ImportError(f"import jepa_world.envs, not {__name__}: a second copy would be another class")

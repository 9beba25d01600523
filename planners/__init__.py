"""`jepa_world.planners`: minimise a cost over actions.

One file a component; its short name is in jepa_world/registry.py.
"""

if __name__ != "jepa_world.planners":
    raise ImportError(
        f"import jepa_world.planners, not {__name__}: a second copy would be another class"
    )

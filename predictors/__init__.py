"""`jepa_world.predictors`: latent + action -> next latent.

One file a component; its short name is in jepa_world/registry.py.
"""

if __name__ != "jepa_world.predictors":
    raise ImportError(
        f"import jepa_world.predictors, not {__name__}: a second copy would be another class"
    )

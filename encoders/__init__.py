"""`jepa_world.encoders`: observation -> latent.

One file a component; its short name is in jepa_world/registry.py.
"""

if __name__ != "jepa_world.encoders":
    raise ImportError(
        f"import jepa_world.encoders, not {__name__}: a second copy would be another class"
    )

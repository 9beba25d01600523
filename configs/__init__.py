"""`jepa_world.configs`: one YAML file per command the README shows; see `--config`."""

if __name__ != "jepa_world.configs":
    raise ImportError(f"import jepa_world.configs, not {__name__}: it is a part of jepa_world")

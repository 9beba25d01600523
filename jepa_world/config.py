"""One way to configure: frozen dataclasses become flags, and a YAML file is a saved command line.

`--config f.yaml` expands into the flags it holds, ahead of the user's own, so one validator checks
both. A field of type `Part` is a swappable component: `--predictor my_pkg.my_module:MyPredictor`
chooses the class, and every keyword-only argument of its constructor becomes a flag
(`--predictor.width 512`). `--encoder runs/x` is the trained encoder of a run: its class and its
options, and `--frozen runs/x`; a folder of transformers, `--encoder models/dinov2`, is as good.

A file is not the user: a class outside the package that it names is imported only where the command
line names its package too, by `--trust my_pkg` or by a part of its own.
"""

import dataclasses
import inspect
import io
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast, get_type_hints

import docstring_parser
import tyro
import yaml

from jepa_world.registry import PARTS, UserError, class_path, load_class, require_trust

C = TypeVar("C")
OR_ROBOT = tyro.conf.arg(aliases=("--robot",))
"""Of a field that names an environment, which a robot of MuJoCo Menagerie is too."""


@dataclass(frozen=True)
class Part:
    """A component by name (short, or `package.module:Class`) and the options it is built with.

    Example:
        >>> predictor = Part("mlp", {"width": 128}).build("predictor", 32, 2)
        >>> type(predictor).__name__
        'MLPPredictor'
    """

    name: str
    options: dict[str, Any] = field(default_factory=lambda: {})

    def build(self, kind: str, *facts: Any) -> Any:
        """Build the part of this kind from facts known at run time, such as `(dim, action_dim)`.

        Raises:
            UserError: unknown name or option, or the constructor refused its arguments.
        """
        part = load_class(kind, self.name)
        known = [option.name for option in part_options(kind, self.name)]
        unknown = [option for option in self.options if option not in known]
        if unknown:
            raise UserError(f"{kind} {self.name!r} has no option {unknown[0]!r}; it has: {known}")
        try:
            return part(*facts, **self.options)
        except Exception as error:
            what = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(f"{kind} {self.name!r} cannot be built: {what}") from error


@dataclass(frozen=True)
class Option:
    """A keyword-only constructor argument of a part."""

    name: str
    type: Any
    default: Any
    help: str


def part_options(kind: str, name: str) -> list[Option]:
    """List the options of a part: the keyword-only arguments of its constructor.

    Raises:
        UserError: unknown part, or an option without a type or a default.
    """
    part = load_class(kind, name)
    hints = get_type_hints(part.__init__)
    helps = {p.arg_name: p.description for p in docstring_parser.parse(part.__doc__ or "").params}
    options: list[Option] = []
    for parameter in inspect.signature(part).parameters.values():
        if parameter.kind is not parameter.KEYWORD_ONLY:
            continue
        if parameter.default is parameter.empty or parameter.name not in hints:
            raise UserError(
                f"{kind} {name!r}: option {parameter.name!r} needs a type and a default"
            )
        text = helps.get(parameter.name) or ""
        options.append(Option(parameter.name, hints[parameter.name], parameter.default, text))
    return options


def parse(config_class: type[C], arguments: Sequence[str], *, program: str) -> C:
    """Parse a command line into a configuration.

    Args:
        config_class: Frozen dataclass; a field of type `Part` is named after the kind of the part.
        arguments: The command line without the program's name; may hold `--config f.yaml`.
        program: The name shown by `--help`.

    Raises:
        UserError: unknown flag or key (the nearest is named), wrong type, unreadable file.
        SystemExit: with code 0 after `--help`.
    """
    *files, own = _layers(list(arguments))
    if "trust" not in {item.name for item in dataclasses.fields(cast(Any, config_class))}:
        own = _drop_options(own, "--trust")  # such a command reads no checkpoint of others
    expanded = _join([*files, own], _part_fields(config_class))
    concrete = _with_part_options(config_class, expanded)
    errors = io.StringIO()
    try:
        with redirect_stderr(errors):
            parsed = cast(Any, tyro.cli(concrete, args=expanded, prog=program))
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(_one_line(errors.getvalue())) from None
    return _without_part_options(config_class, parsed)


def require_at_least(config: Any, group: str = "", /, **least: float) -> None:
    """Check that numbers of a configuration, or of a group in it, are not too small, if given.

    Raises:
        UserError: naming the flag, the number and the least one.
    """
    for name, bound in least.items():
        given = cast(float | None, vars(config)[name])
        if given is not None and not given >= bound:
            raise UserError(f"--{group}{name.replace('_', '-')} is {given}: give at least {bound}")


def to_dict(config: Any) -> dict[str, Any]:
    """Return every value of a configuration as plain YAML types, without where the run is kept."""
    values: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if item.name in ("run_dir", "resume", "trust"):
            continue
        if isinstance(value, Part):
            defaults = {o.name: o.default for o in part_options(item.name, value.name)}
            value = {"name": value.name, **defaults, **value.options}
        values[item.name] = _plain(value)
    return values


def _plain(value: Any) -> Any:
    """Return a value as YAML can hold it: tuples as lists, paths as strings."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in cast(dict[str, Any], value).items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in cast(list[Any], value)]
    if dataclasses.is_dataclass(value):
        return {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    return str(value) if isinstance(value, Path) else value


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        UserError: the file is missing, is large, is not YAML, uses aliases (a short file can stand
            for more values than there is memory), or holds something else than a mapping.
    """
    text = _read(path, LARGEST_YAML)
    try:
        values = yaml.load(text.decode(), _PlainLoader)  # a safe loader
    except Exception as error:  # PyYAML has errors of every kind for what nobody writes
        line = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{str(path)!r} is not a YAML file: {line}") from error
    return _mapping(values, path)


LARGEST_YAML, LARGEST_JSON = 2**18, 2**24  # bytes: PyYAML takes seconds for so many


class _PlainLoader(yaml.SafeLoader):
    """Plain values, each written where it stands."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):  # pyright: ignore[reportUnknownMemberType]
            raise ValueError("it uses an alias (*name): write the value out")
        return super().compose_node(parent, index)


def _read(path: Path, most: int) -> bytes:
    """Return the content of a file of a size that is read in no time."""
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
    except (OSError, ValueError) as error:  # a name may be none
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"cannot read {str(path)!r}: {reason}") from error
    if len(content) > most:
        raise UserError(
            f"{str(path)!r} has more than {most} bytes: no description of anything here"
        )
    return content


def _mapping(values: Any, path: Path) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise UserError(f"{str(path)!r} holds {type(values).__name__}, expected keys and values")
    return cast(dict[str, Any], values)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: the file is missing, is not JSON, or holds something else than an object.
    """
    try:
        values = json.loads(_read(path, LARGEST_JSON))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{str(path)!r} cannot be read as JSON: {error}") from error
    return _mapping(values, path)


def part_from_dict(values: dict[str, Any]) -> Part:
    """Return the part that `{name: ..., option: ...}` describes."""
    options = dict(values)
    name = str(options.pop("name"))
    for key, value in options.items():
        if isinstance(value, list):
            options[key] = tuple(cast(list[Any], value))
    return Part(name, options)


def _part_fields(config_class: type) -> dict[str, Part]:
    """Return the kinds of the swappable parts of a configuration and their defaults."""
    fields = dataclasses.fields(config_class)
    return {item.name: item.default for item in fields if isinstance(item.default, Part)}


def _layers(arguments: list[str]) -> list[list[str]]:
    """Return the flags of each `--config` file, of a run that is resumed, and the user's own."""
    files: list[Path] = []
    rest: list[str] = []
    words = iter(_split_equals(arguments))
    for word in words:
        if word != "--config":
            rest.append(word)
            continue
        name = next(words, "")
        if not name or name.startswith("--"):
            raise UserError("--config needs the name of a file behind it")
        files.append(Path(name))
    if "--resume" in rest and "--run-dir" in rest[:-1]:
        saved = Path(rest[rest.index("--run-dir") + 1]) / "config.yaml"
        files.extend([saved] if saved.is_file() else [])
    trusted = _trusted(rest)
    return [*(_file_flags(file, trusted) for file in files), rest]


def _file_flags(file: Path, trusted: list[str]) -> list[str]:
    """Return the flags that a file holds.

    Raises:
        UserError: a key is no flag, a value is one, or a class it names is not trusted.
    """
    words = _flags_of(file, read_yaml(file), "--")
    for flag, word in _classes(words):
        if flag == "--trust":
            raise UserError(f"{str(file)!r} sets --trust: that is for the command line alone")
        require_trust(repr(str(file)), word, trusted)
    return words


def _trusted(words: list[str]) -> list[str]:
    """Return the packages that a command line names: behind --trust, and of its own parts."""
    return [re.split("[.:]", word)[0] for _, word in _classes(words)]


def _classes(words: list[str]) -> Iterator[tuple[str, str]]:
    """Yield the words that stand for code, `package.module:Name`, and what --trust names."""
    flags = {_part_flag(kind) for kind in (*PARTS, "env")}
    flag = ""
    for word in words:
        if word.startswith("--"):
            flag = word.removesuffix(".name")
        elif flag == "--trust" or (flag in flags and ":" in word):
            yield flag, word.partition("=")[0]


def _split_equals(arguments: list[str]) -> list[str]:
    """Split `--flag=value` in two words and write flags with hyphens."""
    words: list[str] = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if not argument.startswith("--"):
            words.append(argument)
            continue
        words.extend([flag.replace("_", "-")] + ([value] if equals else []))
    return words


def _flags_of(file: Path, values: dict[str, Any], prefix: str) -> list[str]:
    """Write the keys and values that a file holds as the words of a command line.

    Raises:
        UserError: a key is no flag, or a value is one.
    """
    try:
        return words_of(values, prefix)
    except ValueError as error:
        raise UserError(f"{str(file)!r} {error}") from error


def words_of(values: dict[str, Any], prefix: str = "--") -> list[str]:
    """Write keys and values as the words of a command line.

    Raises:
        ValueError: a key is no flag, or a value is one.
    """
    words: list[str] = []
    for key, value in values.items():
        if not re.fullmatch(r"[A-Za-z_][\w.-]*", str(key)):
            raise ValueError(f"has the key {key!r}, which is no flag")
        flag = prefix + str(key).replace("_", "-")
        if isinstance(value, dict):
            words.extend(words_of(cast(dict[str, Any], value), flag + "."))
        elif isinstance(value, bool):
            words.append(flag if value else _negated(flag))
        elif isinstance(value, list):
            words.extend([flag, *_words(cast(list[Any], value))])
        else:
            words.extend([flag, *_words([value])])
    return words


def _words(values: list[Any]) -> list[str]:
    """Write a list as the words behind a flag; a list of lists as one row of words."""
    words: list[str] = []
    for value in values:
        words.extend(_words(cast(list[Any], value)) if isinstance(value, list) else [str(value)])
    for word in words:
        if word.startswith("--") or "\0" in word:
            raise ValueError(f"has the value {word!r}, which is a flag or no text")
    return words


def _negated(flag: str) -> str:
    """Return tyro's negative form of a flag: `--a.no-b` of `--a.b`."""
    group, dot, name = flag[2:].rpartition(".")
    return f"--{group}{dot}no-{name}"


def _join(layers: list[list[str]], parts: dict[str, Part]) -> list[str]:
    """Join the layers, `--predictor X` written as `--predictor.name X`.

    A layer that chooses another class drops the options the layers before it gave the old one.
    """
    joined: list[str] = []
    for layer in layers:
        flags = [_part_flag(kind) for kind in parts]
        words = [f"{word}.name" if word in flags else word for word in _saved_parts(layer, parts)]
        for kind, default in parts.items():
            before = _chosen(joined, kind, default.name)
            if _chosen(words, kind, before) != before:
                joined = _drop_options(joined, f"{_part_flag(kind)}.")
        joined += words
    return joined


def _saved_parts(words: list[str], parts: dict[str, Part]) -> list[str]:
    """Write a folder in the place of a part as the part whose weights it has, and `--frozen`."""
    written: list[str] = []
    for word in words:
        kind = written[-1].lstrip("-").replace("-", "_") if written else ""
        if kind in parts and (Path(word) / "checkpoint" / "config.yaml").is_file():
            flag = written.pop()
            saved = _saved_part(Path(word), kind)
            written += [*_flags_of(Path(word), saved, f"{flag}."), "--frozen", word]
        elif kind == "encoder" and (Path(word) / "config.json").is_file():
            flag = written.pop()
            described = _foreign_encoder(Path(word))
            written += [*_flags_of(Path(word), described, f"{flag}."), "--frozen", word]
        else:
            written.append(word)
    return written


def _saved_part(run: Path, kind: str) -> dict[str, Any]:
    """Return the name and the options of a part in the checkpoint of a run.

    Raises:
        UserError: the checkpoint has no such part, or one from outside the package.
    """
    described = read_yaml(run / "checkpoint" / "config.yaml").get(kind)
    part = cast(dict[str, Any], described) if isinstance(described, dict) else {}
    if not isinstance(part.get("name"), str):
        raise UserError(f"the checkpoint in {str(run)!r} describes no {kind}")
    where = class_path(kind, part["name"])
    if not where.startswith("jepa_world."):  # only the user's own word imports it
        flag = _part_flag(kind)
        raise UserError(
            f"the {kind} in {str(run)!r} is {where}: name it yourself, {flag} {where} and its "
            f"options, and --frozen {run}"
        )
    return part


def _foreign_encoder(folder: Path) -> dict[str, Any]:
    """Return the name and the options of the encoder that a folder of transformers describes.

    Raises:
        UserError: a file that is not of transformers.
    """
    described = read_json(folder / "config.json")
    given = described.get("architectures")
    names = cast(list[Any], given) if isinstance(given, list) else []
    if len(names) != 1 or not str(names[0]).endswith("Model"):
        raise UserError(
            f"{str(folder / 'config.json')!r} describes {given}, expected one encoder: "
            "transformers' folder of a model alone, such as Dinov2Model"
        )
    return {
        "name": "transformers",
        "model": str(names[0]).removesuffix("Model"),
        "options": [f"{key}={text}" for key, text in _settings(described).items()],
    }


def _settings(described: dict[str, Any]) -> dict[str, str]:
    """Return what can be set by `name=value`: numbers, switches, words, and lists of numbers."""
    texts: dict[str, str] = {}
    for key, value in described.items():
        if key in ("architectures", "model_type", "transformers_version", "dtype", "torch_dtype"):
            continue
        items = cast(list[Any], value) if isinstance(value, list) else [value]
        if isinstance(value, str):
            texts[key] = value
        elif len(items) > 1 or not isinstance(value, list):
            if all(isinstance(item, int | float) for item in items):
                texts[key] = ",".join(json.dumps(item) for item in items)
    return texts


def _part_flag(kind: str) -> str:
    """Return the flag of a kind of part: `--masked-predictor` of `masked_predictor`."""
    return "--" + kind.replace("_", "-")


def _drop_options(words: list[str], prefix: str) -> list[str]:
    kept: list[str] = []
    dropping = False
    for word in words:
        if word.startswith("--"):
            dropping = word.startswith(prefix)
        if not dropping:
            kept.append(word)
    return kept


def _chosen(words: list[str], kind: str, default: str) -> str:
    """Return the last name given for a kind of part."""
    flag = f"{_part_flag(kind)}.name"
    names = [words[i + 1] for i, word in enumerate(words[:-1]) if word == flag]
    return names[-1] if names else default


def _with_part_options(config_class: type, words: list[str]) -> type:
    """Return the configuration class, every `Part` replaced by the options of the chosen class."""
    replaced: list[tuple[str, Any, Any]] = []
    for kind, default in _part_fields(config_class).items():
        name = _chosen(words, kind, default.name)
        preset = default.options if name == default.name else {}
        options = [Option("name", str, name, f"short name or package.module:Class of the {kind}")]
        for option in part_options(kind, name):
            start = preset.get(option.name, option.default)
            options.append(dataclasses.replace(option, default=start))
        part_class = dataclasses.make_dataclass(
            kind,
            [(o.name, Annotated[o.type, tyro.conf.arg(help=o.help)], o.default) for o in options],
        )
        part_class.__doc__ = f"Options of the {kind} {name!r}."
        replaced.append((kind, part_class, field(default_factory=part_class)))
    made = dataclasses.make_dataclass(
        config_class.__name__, replaced, bases=(config_class,), frozen=True
    )
    made.__doc__ = inspect.getdoc(config_class)
    return made


def _without_part_options(config_class: type[C], parsed: Any) -> C:
    """Return the configuration itself, its parts as `Part`."""
    parts = _part_fields(config_class)
    values: dict[str, Any] = {}
    for item in dataclasses.fields(parsed):
        value = getattr(parsed, item.name)
        values[item.name] = (
            part_from_dict(dataclasses.asdict(value)) if item.name in parts else value
        )
    return config_class(**values)


def _one_line(message: str) -> str:
    """Fold tyro's box of text into one line without the pointer to `--help`."""
    words: list[str] = []
    for line in message.splitlines():
        text = line.strip("│╭╰╮╯─ \t")
        if line.startswith(("╭", "╰")) or not text:
            continue
        if text.startswith("For full helptext"):
            break
        words.append("nearest:" if text == "Perhaps you meant:" else text)
    return " ".join(words)

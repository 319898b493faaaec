"""Finds and reads recipes: YAML files that may build on another one with `base: other.yaml`."""

from pathlib import Path
from typing import Any

import yaml

from hydra_vision.errors import ConfigError, nearest
from hydra_vision.train.config import check_keys, merge


class _StrictLoader(yaml.SafeLoader):
    """YAML that refuses a key given twice, where PyYAML silently keeps the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [self.construct_object(key, deep=deep) for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(None, None, f'key {name!r} stands twice', node.start_mark)
        return super().construct_mapping(node, deep=deep)


def recipe_folder() -> Path:
    """Folder of the packaged recipes: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / 'configs', package.parent / 'configs'):
        if folder.is_dir():
            return folder
    raise ConfigError(f'no recipes found in {package / "configs"} or {package.parent / "configs"}')


def recipe_names() -> list[str]:
    """Names that `--config` takes."""
    return sorted(path.stem for path in recipe_folder().glob('*.yaml'))


def find_recipe(name: str, beside: Path | None = None) -> Path:
    """Path of a recipe given as a file or as the name of a packaged one.

    Args:
        name: path of a YAML file, or name of a packaged recipe with or without '.yaml'.
        beside: folder that is searched first (where the recipe that names this one lies).
    """
    packaged = recipe_folder() / f'{name.removesuffix(".yaml")}.yaml'
    for path in ([beside / name] if beside else []) + [Path(name).expanduser(), packaged]:
        if path.is_file():
            return path
    raise ConfigError(f'no recipe {name!r}: neither a file nor a packaged recipe{nearest(name, recipe_names())}')


def read_recipe(name: str) -> dict[str, Any]:
    """The values of a recipe as a nested dictionary, its bases merged in and its keys checked."""
    return _read(find_recipe(name), ())


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    path = path.resolve()
    if path in above:
        raise ConfigError(f'{path.name}: its base leads back to itself: {" -> ".join(p.name for p in (*above, path))}')
    try:
        values = yaml.load(path.read_text(encoding='utf-8'), Loader=_StrictLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f'cannot read recipe {path}: {error}') from error
    values = {} if values is None else values
    base = values.pop('base', None) if isinstance(values, dict) else None
    check_keys(values, path.name)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ConfigError(f'{path.name}: base={base!r} is not valid; allowed: the name of another recipe')
    return merge(_read(find_recipe(base, beside=path.parent), (*above, path)), values)
